//! The clocks of a snapshot: a cheap one for its age, an exact one for when a grant ends.

/// What both clocks show when the machine starts (elsewhere than on Linux: the process): 146 years.
///
/// INVARIANT: what lies before the start is as old as it is, for a standby can lag by more than the machine has been up
/// (held by `state_from_before_the_machine_started_is_too_old`).
const START: u64 = 1 << 62;

/// Nanoseconds of a clock that never goes back. The cheap reading is the kernel's last tick, so it may lag the
/// exact one by [`resolution`]; `Instant::now` costs as much as the rest of a check.
#[cfg(target_os = "linux")]
pub(super) fn coarse() -> u64 {
    START.saturating_add(nanos(rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse)))
}

/// The same clock, exactly.
#[cfg(target_os = "linux")]
pub(super) fn exact() -> u64 {
    START.saturating_add(nanos(rustix::time::clock_gettime(rustix::time::ClockId::Monotonic)))
}

/// How far [`coarse`] may lag, in nanoseconds.
#[cfg(target_os = "linux")]
pub(super) fn resolution() -> u64 {
    nanos(rustix::time::clock_getres(rustix::time::ClockId::MonotonicCoarse))
}

/// Microseconds of a clock that goes on while the machine sleeps, for what the database's clock shows now.
#[cfg(target_os = "linux")]
pub(super) fn awake_or_asleep_micros() -> i64 {
    signed(nanos(rustix::time::clock_gettime(rustix::time::ClockId::Boottime)) / 1_000)
}

#[cfg(target_os = "linux")]
fn nanos(time: rustix::time::Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn coarse() -> u64 {
    exact()
}

#[cfg(not(target_os = "linux"))]
pub(super) fn exact() -> u64 {
    static STARTED: std::sync::LazyLock<std::time::Instant> =
        std::sync::LazyLock::new(std::time::Instant::now);
    START.saturating_add(u64::try_from(STARTED.elapsed().as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn resolution() -> u64 {
    0
}

#[cfg(not(target_os = "linux"))]
pub(super) fn awake_or_asleep_micros() -> i64 {
    signed(exact() / 1_000)
}

fn signed(micros: u64) -> i64 {
    i64::try_from(micros).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    #[test]
    fn coarse_clock_lags_at_most_its_resolution() {
        for _ in 0..10_000 {
            let before = super::exact();
            let coarse = super::coarse();
            let after = super::exact();
            assert!(coarse <= after, "{coarse} {after}");
            // Twice: the tick itself may come late on a machine that is busy.
            assert!(coarse + 2 * super::resolution().max(1_000_000) >= before, "{coarse} {before}");
        }
    }
}
