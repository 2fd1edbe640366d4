//! Hearth: the whole OpenAI platform on localhost, in one process.
//!
//! `ARCHITECTURE.md` is the map. One request walks `server` -> `pipeline` -> `engine` ->
//! `scheduler` and `hearth_models` -> `hearth_kernels`, and never turns back.

#![forbid(unsafe_code)]

pub mod auth;
pub mod bundle;
pub mod cli;
pub mod client;
pub mod config;
pub mod embeddings;
pub mod engine;
pub mod error;
pub mod files;
pub mod history;
pub mod jobs;
pub mod kv;
pub mod ledger;
pub mod loadtest;
pub mod pipeline;
pub mod places;
pub mod registry;
pub mod scheduler;
pub mod server;
pub mod shelf;
pub mod store;
pub mod text;
pub mod types;
