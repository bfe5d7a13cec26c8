#![doc = include_str!("../README.md")]

mod emulator;
mod options;

mod directory;
mod error;

mod server;

mod api;
mod groups;
mod members;
mod users;

mod error_body;
mod fields;
mod listing;
mod parameters;

mod assertion;
mod clock;
mod keyless;
mod service_account;
mod token;

mod call_log;
mod fault;
mod gate;
mod quota;

pub use call_log::Call;
pub use directory::{Directory, Object};
pub use emulator::Emulator;
pub use error::Error;
pub use fault::{Effect, Fault, Framing, Target};
pub use gate::Gate;
pub use options::Options;
