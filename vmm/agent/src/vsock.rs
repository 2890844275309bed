//! Sockets of the family AF_VSOCK, vsock(7).

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, accept_with, bind, listen as start, socket_with,
};

const BACKLOG: i32 = 64;

/// A port of this machine, whatever its context id is.
struct Port(u32);

// SAFETY: the address is a whole `sockaddr_vm` that lives as long as the call.
unsafe impl SocketAddrArg for Port {
    unsafe fn with_sockaddr<R>(
        &self,
        call: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        let address = libc::sockaddr_vm {
            svm_family: AddressFamily::VSOCK.as_raw(),
            svm_reserved1: 0,
            svm_port: self.0,
            svm_cid: libc::VMADDR_CID_ANY,
            svm_zero: [0; 4],
        };
        let length = SocketAddrLen::try_from(size_of_val(&address)).unwrap_or(0);
        call((&raw const address).cast(), length)
    }
}

/// A socket that listens on a port.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::VSOCK,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    bind(&socket, &Port(port))?;
    start(&socket, BACKLOG)?;
    Ok(socket)
}

/// The next who connects.
pub fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    Ok(accept_with(listener, SocketFlags::CLOEXEC)?)
}
