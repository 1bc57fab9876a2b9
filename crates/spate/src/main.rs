//! The Spate daemon and command line.
mod resolve;
mod settings;
fn main() {}
