//! Who asks: projects, API keys, and what a key may do.
//!
//! [`Keyring`] turns a bearer token into a [`Caller`]; [`admin`] makes and revokes keys, for the
//! command line and the admin route alike; [`limits`] counts. A key is 256 random bits, so it is
//! stored as a plain SHA-256: a slow, salted hash protects what people choose and others guess, and
//! there is nothing to guess here, while every request would pay for it. Hashes are compared
//! without an early exit. Deliberately absent: HTTP, and users with passwords.

pub mod admin;
mod keyring;
pub mod limits;

pub use keyring::{Caller, Denied, Keyring};

pub use crate::store::{KeyRow, NewKey};
