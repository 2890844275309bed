//! What someone would try who has taken over a thread of a machine's process.

use std::ffi::{CString, c_long};
use std::io;
use std::path::PathBuf;

/// What an attempt knows.
pub struct Target {
    /// The process that started this one: root's, if this one was.
    pub parent: i32,
    /// A file that everybody may read, beside the machine's directory.
    pub secret: PathBuf,
    /// The directory of another machine.
    pub other: PathBuf,
    /// An abstract UNIX socket of the parent.
    pub abstract_socket: String,
}

/// What has to become of an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Without {
    /// It fails also where no filter is.
    Fails,
    /// As a process of root's; of another user's only the filter forbids it.
    FailsAsRoot,
    /// Only the filter forbids it.
    NeedsFilter,
}
use Without::{Fails, FailsAsRoot, NeedsFilter};

/// One attempt.
pub struct Attempt {
    pub name: &'static str,
    /// Whether it fails without filters.
    pub without: Without,
    /// Whether the filter of threads that serve clients lets it through, to fail by itself.
    pub passes_control: bool,
    pub run: fn(&Target) -> io::Result<()>,
}

/// All of them.
pub const ATTEMPTS: &[Attempt] = &[
    // Files.
    attempt("open a file", Fails, |it| {
        open(&it.secret.display().to_string())
    }),
    attempt("open /etc/passwd", Fails, |_| open("/etc/passwd")),
    attempt("open a file upwards", Fails, |_| {
        open("../../../../../../etc/passwd")
    }),
    attempt("open a file by any descriptor", Fails, |_| {
        any_descriptor(&["../etc/passwd", "../../../etc/passwd", "etc/passwd"])
    })
    .in_control(),
    attempt("open another's root by /proc", Fails, |it| {
        any_descriptor(&[
            &format!("{}/root/etc/passwd", it.parent),
            "1/root/etc/passwd",
        ])
    })
    .in_control(),
    attempt("open a process's environment", Fails, |it| {
        any_descriptor(&[&format!("{}/environ", it.parent)])
    })
    .in_control(),
    attempt("write to its own code by /proc", Fails, |_| {
        any_descriptor_for("self/mem", libc::O_RDWR)
    })
    .in_control(),
    attempt("write a kernel's setting", Fails, |_| {
        any_descriptor_for("sys/kernel/core_pattern", libc::O_WRONLY)
    })
    .in_control(),
    attempt("look into another machine's directory", Fails, |it| {
        open(&it.other.join("log").display().to_string())
    }),
    attempt("make a file in its directory", Fails, |_| {
        open_with("made", libc::O_CREAT | libc::O_WRONLY)
    }),
    attempt("remove a file of its directory", Fails, |_| {
        call(libc::SYS_unlink, [path("there"), 0, 0, 0])
    }),
    attempt("make a link", Fails, |_| {
        call(libc::SYS_symlink, [path("/etc/passwd"), path("link"), 0, 0])
    }),
    attempt("make a device", Fails, |_| {
        let device = c_long::try_from(libc::makedev(1, 1)).unwrap_or(0);
        let mode = c_long::from(libc::S_IFBLK | 0o600);
        call(libc::SYS_mknod, [path("device"), mode, device, 0])
    }),
    attempt("open by handle", Fails, |_| {
        call(libc::SYS_open_by_handle_at, [3, 0, 0, 0])
    }),
    attempt("take up room", NeedsFilter, |_| {
        call(libc::SYS_fallocate, [super::open_file().into(), 0, 0, 4096])
    }),
    attempt(
        "share memory with who looks for equal pages",
        NeedsFilter,
        |_| {
            let page = mapped(libc::PROT_READ | libc::PROT_WRITE)?;
            call(
                libc::SYS_madvise,
                [page, 4096, libc::MADV_MERGEABLE.into(), 0],
            )
        },
    ),
    // Programs and code.
    attempt("execute", Fails, |_| {
        let none: [usize; 1] = [0];
        let none = none.as_ptr() as c_long;
        call(libc::SYS_execve, [path("/bin/true"), none, none, 0])
    }),
    attempt("map code", NeedsFilter, |_| {
        map(libc::PROT_READ | libc::PROT_EXEC)
    }),
    attempt("map writable code", NeedsFilter, |_| {
        map(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
    }),
    attempt("make memory code", NeedsFilter, |_| {
        let page = mapped(libc::PROT_READ | libc::PROT_WRITE)?;
        call(
            libc::SYS_mprotect,
            [page, 4096, (libc::PROT_READ | libc::PROT_EXEC).into(), 0],
        )
    }),
    attempt("make memory code by pkey", NeedsFilter, |_| {
        let page = mapped(libc::PROT_READ | libc::PROT_WRITE)?;
        let code = (libc::PROT_READ | libc::PROT_EXEC).into();
        call(libc::SYS_pkey_mprotect, [page, 4096, code, -1])
    }),
    attempt("start a process", NeedsFilter, |_| {
        let flags = c_long::from(libc::SIGCHLD);
        let child = value(libc::SYS_clone, [flags, 0, 0, 0])?;
        if child == 0 {
            exit();
        }
        Ok(())
    }),
    attempt("start a process by clone3", NeedsFilter, |_| {
        let mut arguments = [0_u64; 11];
        arguments[4] = u64::from(libc::SIGCHLD.unsigned_abs());
        let arguments = (&raw const arguments) as c_long;
        let child = value(libc::SYS_clone3, [arguments, 88, 0, 0])?;
        if child == 0 {
            exit();
        }
        Ok(())
    })
    .in_control(),
    attempt("change its behaviour", NeedsFilter, |_| {
        call(libc::SYS_personality, [0x0040_0000, 0, 0, 0])
    }),
    // Sockets.
    attempt("an internet socket", NeedsFilter, |_| {
        socket(libc::AF_INET, libc::SOCK_DGRAM)
    }),
    attempt("reach the host's network", Fails, |_| reach_network()),
    attempt("a netlink socket", NeedsFilter, |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW)
    }),
    attempt("a packet socket", Fails, |_| {
        socket(libc::AF_PACKET, libc::SOCK_RAW)
    }),
    attempt("an abstract socket of the host", Fails, |it| {
        reach_abstract(&it.abstract_socket)
    })
    .in_all(),
    // Other processes.
    attempt("trace another process", Fails, |it| {
        call(libc::SYS_ptrace, [16, it.parent.into(), 0, 0])
    }),
    attempt("read another process's memory", Fails, |it| {
        call(libc::SYS_process_vm_readv, [it.parent.into(), 0, 0, 0])
            .and_then(|()| call(libc::SYS_ptrace, [16, it.parent.into(), 0, 0]))
    }),
    attempt("read another process's memory at an address", Fails, |it| {
        // Where this program's own code is, if it has no layout of its own: only a
        // process that may be read says that there is nothing.
        let mut byte = 0_u8;
        let own = [(&raw mut byte) as u64, 1];
        let theirs = [0x1000_u64, 1];
        let (own, theirs) = ((&raw const own) as c_long, (&raw const theirs) as c_long);
        let number = libc::SYS_process_vm_readv;
        // SAFETY: as in `value`.
        let got = unsafe { libc::syscall(number, it.parent, own, 1, theirs, 1, NONE) };
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EFAULT) => Ok(()),
            _ if got == 1 => Ok(()),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }),
    attempt("move another process's pages", Fails, |it| {
        call(libc::SYS_move_pages, [it.parent.into(), 0, 0, 0])
    }),
    attempt("signal another process", Fails, |it| {
        call(libc::SYS_kill, [it.parent.into(), 0, 0, 0])
    }),
    attempt("signal another process's thread", Fails, |it| {
        call(libc::SYS_tgkill, [it.parent.into(), it.parent.into(), 0, 0])
    }),
    attempt("take another process's descriptor", Fails, |it| {
        let process = value(libc::SYS_pidfd_open, [it.parent.into(), 0, 0, 0])?;
        call(libc::SYS_pidfd_getfd, [process, 2, 0, 0])
    }),
    attempt("slow another process down", FailsAsRoot, |it| {
        call(libc::SYS_setpriority, [0, it.parent.into(), 19, 0])
    }),
    // Rights.
    attempt("become root", Fails, |_| {
        call(libc::SYS_setresuid, [0, 0, 0, 0])
    }),
    attempt("join root's group", Fails, |_| {
        call(libc::SYS_setresgid, [0, 0, 0, 0])
    }),
    attempt("take capabilities", Fails, |_| {
        let header: [u32; 2] = [0x2008_0522, 0];
        // CAP_CHOWN, effective and permitted.
        let sets: [u32; 6] = [1, 1, 0, 0, 0, 0];
        let (header, sets) = ((&raw const header) as c_long, (&raw const sets) as c_long);
        call(libc::SYS_capset, [header, sets, 0, 0])
    }),
    attempt("gain privileges again", Fails, |_| {
        call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS.into(), 0, 0, 0])
    }),
    attempt("raise a limit", Fails, |_| {
        let limit: [u64; 2] = [1 << 20, 1 << 20];
        let limit = (&raw const limit) as c_long;
        call(
            libc::SYS_prlimit64,
            [0, libc::RLIMIT_NOFILE.into(), limit, 0],
        )
    }),
    // Namespaces and mounts.
    attempt("mount", Fails, |_| {
        call(libc::SYS_mount, [path("none"), path("/"), path("tmpfs"), 0])
    }),
    attempt("unmount", Fails, |_| {
        call(libc::SYS_umount2, [path("/"), 2, 0, 0])
    }),
    attempt("write to its root", Fails, |_| {
        let writable = c_long::try_from(libc::MS_REMOUNT | libc::MS_BIND).unwrap_or(0);
        call(libc::SYS_mount, [path("none"), path("/"), 0, writable])
    }),
    attempt("a mount namespace", Fails, |_| unshare(libc::CLONE_NEWNS)),
    attempt("a network namespace", Fails, |_| {
        unshare(libc::CLONE_NEWNET)
    }),
    attempt("another process's namespaces", Fails, |it| {
        let process = value(libc::SYS_pidfd_open, [it.parent.into(), 0, 0, 0])?;
        let kinds = libc::CLONE_NEWNET | libc::CLONE_NEWNS | libc::CLONE_NEWUTS;
        call(libc::SYS_setns, [process, kinds.into(), 0, 0])
    }),
    attempt("the host's network namespace by /proc", Fails, |it| {
        any_descriptor(&[&format!("{}/ns/net", it.parent), "1/ns/net"])
    })
    .in_control(),
    attempt("a user namespace", NeedsFilter, |_| {
        unshare(libc::CLONE_NEWUSER)
    }),
    attempt("change its root", Fails, |_| {
        call(libc::SYS_chroot, [path("."), 0, 0, 0])
    }),
    attempt("pivot its root", Fails, |_| {
        call(libc::SYS_pivot_root, [path("."), path("."), 0, 0])
    }),
    // The kernel.
    attempt("keys", NeedsFilter, |_| {
        // KEYCTL_GET_KEYRING_ID of the session's, made if it is not there.
        call(libc::SYS_keyctl, [0, -3, 1, 0])
    }),
    attempt("bpf", Fails, |_| call(libc::SYS_bpf, [5, 0, 0, 0])),
    attempt("io_uring", NeedsFilter, |_| {
        let parameters = [0_u8; 120];
        call(
            libc::SYS_io_uring_setup,
            [1, parameters.as_ptr() as c_long, 0, 0],
        )
    }),
    attempt("performance counters", Fails, |_| {
        let mut attributes = [0_u8; 128];
        attributes[4] = 128;
        let attributes = attributes.as_ptr() as c_long;
        call(libc::SYS_perf_event_open, [attributes, -1, 0, -1])
    }),
    attempt("load a module", Fails, |_| {
        call(libc::SYS_init_module, [0, 0, path(""), 0])
    }),
    attempt("handle the kernel's faults", FailsAsRoot, |_| {
        call(libc::SYS_userfaultfd, [0, 0, 0, 0])
    }),
    attempt("name the host", Fails, |_| {
        call(libc::SYS_sethostname, [path("x"), 1, 0, 0])
    }),
    attempt("set the time", Fails, |_| {
        call(libc::SYS_settimeofday, [0, 0, 0, 0]).and(set_time())
    }),
    attempt("ports of the host", Fails, |_| {
        call(libc::SYS_iopl, [3, 0, 0, 0])
    }),
    attempt("reboot", Fails, |_| {
        call(libc::SYS_reboot, [0x1234, 0, 0, 0])
    }),
    attempt("type into a terminal", Fails, |_| {
        call(libc::SYS_ioctl, [0, 0x5412, path("x"), 0])
    }),
    // Ways around a filter.
    attempt("the calls of x32", Fails, |_| {
        call(0x4000_0000 | 520, [path("/bin/true"), 0, 0, 0])
    }),
    attempt("the calls of i386", NeedsFilter, |_| old_getpid()),
];

const fn attempt(
    name: &'static str,
    without: Without,
    run: fn(&Target) -> io::Result<()>,
) -> Attempt {
    Attempt {
        name,
        without,
        passes_control: false,
        run,
    }
}

impl Attempt {
    /// The filter of clients' threads cannot tell it from what they do.
    const fn in_control(mut self) -> Self {
        self.passes_control = true;
        self
    }

    /// No filter that has sockets can.
    const fn in_all(self) -> Self {
        self.in_control()
    }
}

/// The last argument of six is on the stack, where an `int` leaves half of it as it was.
const NONE: c_long = 0;

fn value(number: c_long, [a, b, c, d]: [c_long; 4]) -> io::Result<c_long> {
    // SAFETY: what it does to this process, if it does, ends with it; pointers among the
    // arguments are to memory of the caller, or null.
    match unsafe { libc::syscall(number, a, b, c, d, NONE, NONE) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

fn call(number: c_long, arguments: [c_long; 4]) -> io::Result<()> {
    value(number, arguments).map(drop)
}

/// A path as an argument; the process ends before it would be freed.
fn path(path: &str) -> c_long {
    CString::new(path).expect("a path without zero").into_raw() as c_long
}

fn open(name: &str) -> io::Result<()> {
    open_with(name, libc::O_RDONLY)
}

fn open_with(name: &str, flags: i32) -> io::Result<()> {
    let here = c_long::from(libc::AT_FDCWD);
    call(libc::SYS_openat, [here, path(name), flags.into(), 0o600])
}

/// Relative to whatever descriptor is open.
fn any_descriptor(names: &[&str]) -> io::Result<()> {
    let tried = names
        .iter()
        .map(|name| any_descriptor_for(name, libc::O_RDONLY));
    tried
        .reduce(|done, next| done.or(next))
        .expect("there are names")
}

fn any_descriptor_for(name: &str, flags: i32) -> io::Result<()> {
    // That of /proc first: others are forbidden by number.
    let mut last = Err(io::ErrorKind::NotFound.into());
    for fd in super::proc_descriptors() {
        last = call(
            libc::SYS_openat,
            [(*fd).into(), path(name), flags.into(), 0],
        );
        if last.is_ok() {
            return last;
        }
    }
    last
}

fn mapped(protection: i32) -> io::Result<c_long> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    value(libc::SYS_mmap, [0, 4096, protection.into(), flags.into()])
}

fn map(protection: i32) -> io::Result<()> {
    mapped(protection).map(drop)
}

fn socket(family: i32, kind: i32) -> io::Result<()> {
    call(libc::SYS_socket, [family.into(), kind.into(), 0, 0])
}

/// To the loopback of the host: one of its own is down.
fn reach_network() -> io::Result<()> {
    std::net::TcpStream::connect("127.0.0.1:9")
        .map(drop)
        .or_else(|error| {
            // Nobody listens, but somebody says so: it was reached.
            match error.kind() {
                io::ErrorKind::ConnectionRefused => Ok(()),
                _ => Err(error),
            }
        })
}

fn reach_abstract(name: &str) -> io::Result<()> {
    use std::os::linux::net::SocketAddrExt as _;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    std::os::unix::net::UnixStream::connect_addr(&address).map(drop)
}

fn unshare(flags: i32) -> io::Result<()> {
    call(libc::SYS_unshare, [flags.into(), 0, 0, 0])
}

fn set_time() -> io::Result<()> {
    let time: [i64; 2] = [0, 0];
    call(
        libc::SYS_clock_settime,
        [0, (&raw const time) as c_long, 0, 0],
    )
}

/// `getpid` as programs of 32 bits call it, whose numbers are others.
fn old_getpid() -> io::Result<()> {
    let mut register: i64 = 20;
    // SAFETY: the call takes no argument and changes the register with its number only.
    unsafe {
        std::arch::asm!("int 0x80", inout("rax") register);
    }
    match register {
        got if got > 0 => Ok(()),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// As a log is made anew that is full: read, emptied, written.
pub fn make_log_anew() -> io::Result<()> {
    let mut end = [0_u8; 16];
    let buffer = end.as_mut_ptr() as c_long;
    call(libc::SYS_pread64, [2, buffer, 16, 0])?;
    call(libc::SYS_ftruncate, [2, 0, 0, 0])?;
    call(libc::SYS_write, [2, path("anew"), 4, 0])
}

fn exit() -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}
