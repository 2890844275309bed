//! Virtual machines end to end, by the program: run, commit, restore, many at a
//! time, and everything that can go wrong with them.

mod chain;
mod changed;
mod clock;
mod confined;
mod console;
mod control;
mod cpu;
mod damaged;
mod disks;
mod failing;
mod hostile;
mod killed;
mod lost;
mod many;
mod mounts;
mod negative;
mod pausing;
mod precopy;
mod ready;
mod reseed;
mod restored;
