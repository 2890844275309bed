//! What a guest is told through its agent: fresh entropy, the time and the addresses of its
//! network interfaces after it was restored, and the time after a long pause.
//!
//! A guest without an agent, or a machine without the device, is left as it is.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use snapstore_vmm::agent::{AGENT_PORT, AgentClient, AgentError};
use snapstore_vmm::confine::{self, Role};
use snapstore_vmm::control::Vm;

use crate::runtime::VSOCK;

/// How long a guest's agent may take to answer.
const AGENT_PATIENCE: Duration = Duration::from_secs(30);

/// How long it may take to take entropy, where that is required.
const RESEED_PATIENCE: Duration = Duration::from_secs(10);

/// Starts the thread that does so, once the guest runs.
///
/// Where it is required that a restored guest takes entropy, the machine ends if it does not.
pub fn attend(vm: &Arc<Vm>, is_restored: bool, require_reseed: bool) -> anyhow::Result<()> {
    let vsock = Path::new(VSOCK);
    if !vsock.exists() {
        if require_reseed {
            bail!(
                "the snapshot's machine has no vsock device, so its guest cannot be reseeded; \
                 leave --require-reseed out if it need not be"
            );
        }
        return Ok(());
    }
    let vm = vm.clone();
    std::thread::Builder::new()
        .name("refresh".to_owned())
        .spawn(move || {
            confine::enter(Role::Agent);
            if !vm.machine().wait_until_running() {
                return;
            }
            if is_restored {
                refresh(&vm, vsock, require_reseed);
            }
            keep_time(&vm, vsock);
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// After a restore.
fn refresh(vm: &Vm, vsock: &Path, require_reseed: bool) {
    let networks = vm.machine().networks().into_iter();
    let macs: Vec<_> = networks
        .filter_map(|network| Some((network.saved_mac?, network.mac)))
        .collect();
    let patience = match require_reseed {
        true => RESEED_PATIENCE,
        false => AGENT_PATIENCE,
    };
    let deadline = Instant::now() + patience;
    let reseeded = AgentClient::connect(vsock, AGENT_PORT, patience).and_then(|agent| {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut agent = match require_reseed {
            true => agent.with_patience(left),
            false => agent,
        };
        agent.reseed_afresh().map(|()| agent)
    });
    match &reseeded {
        Ok(_) => vm.set_reseeded(),
        // It runs no further, whatever it did until now.
        Err(error) if require_reseed => {
            vm.machine().end_not_reseeded(error.to_string());
            return;
        }
        Err(_) => {}
    }
    let refreshed = reseeded.or_else(|error| match error {
        AgentError::Refused { .. } => {
            tracing::warn!(%error, "the guest's randomness is still the snapshot's");
            AgentClient::connect(vsock, AGENT_PORT, patience)
        }
        error => Err(error),
    });
    match refreshed.and_then(|mut agent| agent.after_restore(&macs)) {
        Ok(()) => {}
        // It was there, and its guest is not as it should be.
        Err(error @ AgentError::Refused { .. }) => {
            tracing::warn!(%error, "something of the guest is still the snapshot's");
        }
        Err(error) => {
            tracing::debug!(%error, "something of the guest is still the snapshot's");
        }
    }
}

/// After each long pause, until the machine ends.
fn keep_time(vm: &Vm, vsock: &Path) {
    let mut seen = 0;
    while let Some(pauses) = vm.machine().wait_for_long_pause(seen) {
        seen = pauses;
        let told = AgentClient::connect(vsock, AGENT_PORT, AGENT_PATIENCE)
            .and_then(|mut agent| agent.set_time(SystemTime::now()));
        if let Err(error) = told {
            tracing::debug!(%error, "the guest's clock is late by a pause");
        }
    }
}
