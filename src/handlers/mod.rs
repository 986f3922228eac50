//! Handlers that come with pgcue.

mod demo;

pub(crate) use demo::demo;
