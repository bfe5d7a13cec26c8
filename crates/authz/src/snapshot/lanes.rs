//! Eight tags of eight bits that are compared at once: to go from slot to slot is a branch that the processor mispredicts at
//! every other look-up.

/// Tags side by side, the first one lowest.
pub(super) const LANES: usize = 8;
const EACH: u64 = u64::MAX / 0xff;

/// From bits that [`first_place`] does not look at. Never 0, which marks an empty lane, nor 1.
///
/// INVARIANT: an empty lane differs from any tag by more than its lowest bit, so [`zeros`] never takes one for that tag, and what lies
/// at the place of nothing is never read as an entry (held by `no_empty_lane_is_taken_for_one_with_a_tag`).
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "eight bits of the hash")]
pub(super) fn tag_of(hash: u64) -> u8 {
    ((hash >> 32) as u8).max(2)
}

/// Where the search for a hash begins. Multiply and shift: any number of places below 2³², no division.
#[inline]
pub(super) fn first_place(hash: u64, places: usize) -> usize {
    let low = hash & u64::from(u32::MAX);
    usize::try_from(low.wrapping_mul(places as u64) >> 32).unwrap_or(0)
}

#[inline]
pub(super) fn next_place(place: usize, places: usize) -> usize {
    if place + 1 == places { 0 } else { place + 1 }
}

/// The tags with that of one more lane.
pub(super) fn with_tag(tags: u64, lane: usize, hash: u64) -> u64 {
    tags | u64::from(tag_of(hash)) << (8 * lane)
}

/// Which lanes may have the tag of a hash, the first one lowest; [`next_lane`] goes through them.
#[inline]
pub(super) fn lanes_of(tags: u64, hash: u64) -> u64 {
    zeros(tags ^ (u64::from(tag_of(hash)) * EACH))
}

/// The first of these lanes, which are then without it.
#[inline]
pub(super) fn next_lane(lanes: &mut u64) -> Option<usize> {
    let lane = (*lanes != 0).then(|| lanes.trailing_zeros() as usize / 8)?;
    *lanes &= *lanes - 1;
    Some(lane)
}

#[inline]
pub(super) fn has_empty_lane(tags: u64) -> bool {
    zeros(tags) != 0
}

/// The highest bit of each lane that is zero. A lane of 1 above one that is zero is taken for one too, so look at what
/// is found; that there is none is certain.
#[inline]
fn zeros(lanes: u64) -> u64 {
    lanes.wrapping_sub(EACH) & !lanes & (EACH << 7)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(tag: u64) -> u64 {
        tag << 32 | 7
    }

    fn lanes(tags: u64, tag: u64) -> Vec<usize> {
        let mut lanes = lanes_of(tags, hash(tag));
        std::iter::from_fn(|| next_lane(&mut lanes)).collect()
    }

    #[test]
    fn lanes_with_a_tag_are_found() {
        for filled in 0..=LANES {
            let tags = (0..filled).fold(0, |tags, lane| with_tag(tags, lane, hash(lane as u64 * 36)));
            assert_eq!(has_empty_lane(tags), filled < LANES);
            for lane in 0..filled {
                assert_eq!(lanes(tags, lane as u64 * 36), [lane], "{tags:x}");
            }
            for tag in (0..256).filter(|tag| *tag > 2 && (tag % 36 != 0 || tag / 36 >= filled as u64)) {
                assert_eq!(lanes(tags, tag), [] as [usize; 0], "{tags:x} {tag}");
            }
        }
        // One tag in all lanes.
        let tags = (0..LANES).fold(0, |tags, lane| with_tag(tags, lane, hash(9)));
        assert!(lanes(tags, 9).into_iter().eq(0..LANES));
    }

    #[test]
    fn no_empty_lane_is_taken_for_one_with_a_tag() {
        for filled in 0..LANES {
            for held in 0..256 {
                for other in [held, held ^ 1, 0, 1, 2] {
                    let tag = |lane: usize| hash(if lane.is_multiple_of(2) { held } else { other });
                    let tags = (0..filled).fold(0, |tags, lane| with_tag(tags, lane, tag(lane)));
                    for asked in 0..256 {
                        let found = lanes(tags, asked);
                        assert!(found.iter().all(|lane| *lane < filled), "{tags:x} {asked} {found:?}");
                        let has = |lane: usize| tag_of(tag(lane)) == tag_of(hash(asked));
                        assert!(
                            (0..filled).all(|lane| !has(lane) || found.contains(&lane)),
                            "{tags:x} {asked}"
                        );
                    }
                }
            }
        }
    }
}
