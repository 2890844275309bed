//! What a driver can get wrong.

/// What a driver made is not a queue.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum Broken {
    /// Its rings.
    #[error("a queue: {0}")]
    Ring(virtio_queue::Error),
    /// A chain of descriptors in it.
    #[error("a request that {0}")]
    Chain(&'static str),
    /// A buffer whose content must be known, or in which the driver waits for an
    /// answer.
    #[error("a request outside guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}
