//! What a guest is told that stood still, or was restored.

use std::time::{Duration, Instant, SystemTime};

use super::{AgentClient, AgentError, MacAddress, Result};

/// How late a clock may be that was set.
const MOST_LATE: Duration = Duration::from_millis(200);
/// How often it is set to be no later than that: a guest that is always slow keeps what it has.
const SETTINGS: u32 = 10;

impl AgentClient {
    /// Sets the guest's clock to that of the host. A guest that took long to take the time is late by as much, and
    /// is told it again.
    ///
    /// # Errors
    /// As [`AgentClient::set_time`].
    pub fn set_time_now(&mut self) -> Result<()> {
        for _ in 0..SETTINGS {
            let began = Instant::now();
            self.set_time(SystemTime::now())?;
            if began.elapsed() <= MOST_LATE {
                break;
            }
        }
        Ok(())
    }

    /// Gives a restored guest what it cannot know of: fresh entropy of the host,
    /// then the time, then to each network interface of `macs` the second address
    /// instead of the first. Entropy first, since nothing that happens before it is
    /// unlike what happens in another machine restored from the same snapshot. What
    /// the agent refuses keeps it from nothing else.
    ///
    /// # Errors
    /// The agent may not, of which the first is told, or the connection broke.
    pub fn after_restore(&mut self, macs: &[(MacAddress, MacAddress)]) -> Result<()> {
        let mut refused = None;
        let reseeded = unless_refused(self.reseed_afresh(), &mut refused);
        let done = reseeded.and_then(|()| self.set_time_and_macs(macs));
        refused.map_or(done, Err)
    }

    /// The part of [`AgentClient::after_restore`] that comes after the entropy.
    ///
    /// # Errors
    /// As [`AgentClient::after_restore`].
    pub fn set_time_and_macs(&mut self, macs: &[(MacAddress, MacAddress)]) -> Result<()> {
        let mut refused = None;
        let timed = unless_refused(self.set_time_now(), &mut refused);
        let done = timed.and_then(|()| {
            macs.iter()
                .try_for_each(|(from, to)| unless_refused(self.set_mac(*from, *to), &mut refused))
        });
        // An agent that knows no such request says so, and leaves.
        refused.map_or(done, Err)
    }
}

/// What was refused keeps from nothing else; the first of it is kept in `refused`.
fn unless_refused(done: Result<()>, refused: &mut Option<AgentError>) -> Result<()> {
    match done {
        Err(error @ AgentError::Refused { .. }) => {
            refused.get_or_insert(error);
            Ok(())
        }
        other => other,
    }
}
