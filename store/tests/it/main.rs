//! The store's contract, tested from outside. One binary, a directory of its own for each test.

mod accounts;
mod corpus;
mod diffs;
mod edits;
mod faults;
mod flips;
mod full;
mod gc;
mod helpers;
mod ingests;
mod kills;
mod model;
mod names;
mod powercut;
mod processes;
mod reflinks;
mod repairs;
mod seam;
mod snapshots;
mod survivors;
mod sweeps;
mod unchecked;
mod volumes;
mod workload;
