//! Virtual machines end to end, by the program: run, commit, restore, many at a
//! time, and everything that can go wrong with them.

mod chain;
mod changed;
mod clock;
mod common_memory;
mod confined;
mod console;
mod control;
mod copying;
mod cpu;
mod damaged_snapshots;
mod dead_mount_server;
mod deadlines;
mod disks;
mod failed_commits;
mod guest_misbehaviour;
mod hanging;
mod killed;
mod logs;
mod many;
mod metrics;
mod mounts;
mod names;
mod panicking;
mod paths;
mod pausing;
mod precopy;
mod programs;
mod ready;
mod remote;
mod remote_server;
mod reseed;
mod restored;
mod starting;
mod working_sets;
mod wrong_state_is_noticed;
