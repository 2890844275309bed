//! Sockets of the family AF_VSOCK, vsock(7).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, accept_with, bind, listen as start, socket_with,
};

const BACKLOG: i32 = 64;

/// A port of a context id.
struct Port {
    cid: u32,
    port: u32,
}

// SAFETY: the address is a whole `sockaddr_vm` that lives as long as the call.
unsafe impl SocketAddrArg for Port {
    unsafe fn with_sockaddr<R>(
        &self,
        call: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        let address = libc::sockaddr_vm {
            svm_family: AddressFamily::VSOCK.as_raw(),
            svm_reserved1: 0,
            svm_port: self.port,
            svm_cid: self.cid,
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
    // Whatever this machine's context id is: a restored one may have another.
    bind(
        &socket,
        &Port {
            cid: libc::VMADDR_CID_ANY,
            port,
        },
    )?;
    start(&socket, BACKLOG)?;
    Ok(socket)
}

/// The next who connects.
///
/// # Errors
/// The operating system's; `ECONNABORTED` for one that is not the host, and is hung up on.
pub fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let socket = accept_with(listener, SocketFlags::CLOEXEC)?;
    if is_host(&peer(&socket)?) {
        return Ok(socket);
    }
    Err(io::Error::from_raw_os_error(libc::ECONNABORTED))
}

/// Who is at the other end.
fn peer(socket: &OwnedFd) -> io::Result<libc::sockaddr_vm> {
    let mut address = MaybeUninit::<libc::sockaddr_vm>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `length` bytes to the address.
    let got = unsafe {
        libc::getpeername(
            socket.as_raw_fd(),
            address.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed at first, and every value of its fields is one.
    Ok(unsafe { address.assume_init() })
}

/// Whether a peer is the host. A guest with the transport `vsock_loopback` lets its own
/// users connect to context id 1 or to its own, and nested guests have ids of theirs: they
/// are not to command the agent, which has more rights than they.
fn is_host(peer: &libc::sockaddr_vm) -> bool {
    i32::from(peer.svm_family) == libc::AF_VSOCK && peer.svm_cid == libc::VMADDR_CID_HOST
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(family: i32, cid: u32) -> libc::sockaddr_vm {
        libc::sockaddr_vm {
            svm_family: libc::sa_family_t::try_from(family).unwrap(),
            svm_reserved1: 0,
            svm_port: 1023,
            svm_cid: cid,
            svm_zero: [0; 4],
        }
    }

    #[test]
    fn only_the_host_is_the_host() {
        assert!(is_host(&peer(libc::AF_VSOCK, 2)));
        for cid in [0, 1, 3, 4, libc::VMADDR_CID_ANY] {
            assert!(!is_host(&peer(libc::AF_VSOCK, cid)), "{cid}");
        }
        assert!(!is_host(&peer(libc::AF_UNIX, 2)));
    }

    #[test]
    fn a_user_of_the_guest_is_not_served() {
        let Ok(listener) = listen(45_671) else {
            println!("SKIPPED a_user_of_the_guest_is_not_served: no vsock");
            return;
        };
        let client = std::thread::spawn(|| {
            let socket = socket_with(
                AddressFamily::VSOCK,
                SocketType::STREAM,
                SocketFlags::CLOEXEC,
                None,
            )?;
            rustix::net::connect(
                &socket,
                &Port {
                    cid: libc::VMADDR_CID_LOCAL,
                    port: 45_671,
                },
            )?;
            Ok::<_, io::Error>(socket)
        });
        let Ok(socket) = client.join().unwrap() else {
            println!("SKIPPED a_user_of_the_guest_is_not_served: no loopback of vsock");
            return;
        };
        let refused = accept(&listener).unwrap_err();
        assert_eq!(
            refused.kind(),
            io::ErrorKind::ConnectionAborted,
            "{refused}"
        );
        drop(socket);
    }
}
