//! Compiles the library anew when a migration is added or changed (`migrate!` embeds them).

fn main() {
    println!("cargo::rerun-if-changed=migrations");
    println!("cargo::rerun-if-changed=.sqlx");
}
