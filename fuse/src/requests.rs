//! What both servers do alike with the kernel's requests.

use std::cell::RefCell;
use std::time::Instant;

use fuser::{Errno, InitFlags, KernelConfig, ReplyData};

use crate::counters::Counters;

thread_local! {
    static REPLY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Takes what the kernel offers that makes things faster, and what else is `wanted`. Absent
/// on old kernels: then things are slower, not wrong.
pub(crate) fn connect(config: &mut KernelConfig, wanted: &[InitFlags], read_ahead_bytes: u32) {
    let faster = [
        InitFlags::FUSE_ASYNC_READ,
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_MAX_PAGES,
    ];
    for flag in faster.iter().chain(wanted) {
        let _ = config.add_capabilities(*flag);
    }
    if let Err(limit) = config.set_max_readahead(read_ahead_bytes) {
        let _ = config.set_max_readahead(limit);
    }
}

/// Answers a read with what `read` puts into a buffer of this size, which the thread keeps,
/// and counts it.
pub(crate) fn answer_read(
    counters: &Counters,
    size: u32,
    reply: ReplyData,
    read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
) {
    let read = |buffer: &mut [u8]| read(buffer).map(Some);
    // It is answered: there is always something.
    let _ = answer_if_any(counters, Instant::now(), size, reply, read);
}

/// The same for a read that began then, if there is an answer. Else the reply comes back.
pub(crate) fn answer_if_any(
    counters: &Counters,
    began: Instant,
    size: u32,
    reply: ReplyData,
    read: impl FnOnce(&mut [u8]) -> Result<Option<usize>, Errno>,
) -> Option<ReplyData> {
    let Ok(size) = usize::try_from(size) else {
        reply.error(Errno::EINVAL);
        return None;
    };
    REPLY.with_borrow_mut(|buffer| {
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        let read = read(&mut buffer[..size]);
        match read {
            Ok(Some(len)) => reply.data(&buffer[..len]),
            Ok(None) => return Some(reply),
            Err(errno) => reply.error(errno),
        }
        counters.read(size, began.elapsed(), read.ok().flatten());
        None
    })
}
