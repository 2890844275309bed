//! What can go wrong in the monitor, one variant per kind of cause.

use std::io;
use std::path::PathBuf;

/// The result of a monitor operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any failure of a monitor operation.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum Error {
    /// `/dev/kvm` cannot be used.
    #[error(
        "cannot use /dev/kvm: {source}; this needs a kernel with KVM and read-write access to /dev/kvm"
    )]
    NoKvm {
        /// The operating system's error.
        source: io::Error,
    },
    /// KVM refused a request.
    #[error("KVM cannot {action}: {source}")]
    Kvm {
        /// What was asked of it.
        action: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// The operating system refused a request.
    #[error("cannot {action}: {source}")]
    Os {
        /// What was asked of it.
        action: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// The operating system refused an operation on a file.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The operating system refuses to confine a machine's process.
    #[error(
        "cannot confine the machine: it cannot {action}: {source}; --no-confine runs it unconfined"
    )]
    Confine {
        /// What was to be given up, or done for that.
        action: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// Guest memory of a size that cannot be.
    #[error(
        "guest memory of {bytes} bytes is not possible; it is a multiple of 4096 from 1 MiB to 1 TiB"
    )]
    MemorySize {
        /// The size asked for, in bytes.
        bytes: u64,
    },
    /// A number of vCPUs that cannot be.
    #[error("{cpus} vCPUs are not possible; 1 to {limit} are")]
    Cpus {
        /// The number asked for.
        cpus: u32,
        /// The most that are possible.
        limit: u32,
    },
    /// A process whose memory was to be read has ended.
    #[error("the process whose memory was to be read has ended; freeze the memory again")]
    MemoryGone,
    /// A memory image that is not as long as the guest's memory.
    #[error(
        "the memory image is {found} bytes long, the VM state needs {expected}; they are of different snapshots, or the image is incomplete"
    )]
    ImageLength {
        /// Its length in bytes.
        found: u64,
        /// The guest's memory in bytes.
        expected: u64,
    },
    /// A kernel that is empty, or longer than the memory has room for.
    #[error("{} is empty or longer than the {room_bytes} bytes of memory there are for it", path.display())]
    KernelSize {
        /// The file.
        path: PathBuf,
        /// The room for it in bytes.
        room_bytes: u64,
    },
    /// A file that is no kernel.
    #[error("{} is no kernel: neither a bzImage nor an ELF file; give a distribution's /boot/vmlinuz-*, or a vmlinux", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// A kernel that is not all there.
    #[error("{} is {found_bytes} bytes long and should be at least {expected_bytes}: it is not the whole kernel; copy it again", path.display())]
    KernelTruncated {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found_bytes: u64,
        /// What its headers say, in bytes.
        expected_bytes: u64,
    },
    /// A kernel of a kind that cannot be booted.
    #[error("{} cannot be booted: {cause}", path.display())]
    KernelUnsupported {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: &'static str,
    },
    /// A kernel's file that contradicts itself.
    #[error("{} cannot be loaded: {source}", path.display())]
    KernelMalformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: linux_loader::loader::Error,
    },
    /// A kernel for which there is not enough memory.
    #[error("{} needs memory up to {needed_bytes} bytes, and below 3 GiB there are {room_bytes}; give the machine more memory", path.display())]
    KernelRoom {
        /// The file.
        path: PathBuf,
        /// The address behind the last byte that it needs.
        needed_bytes: u64,
        /// The memory below 3 GiB in bytes.
        room_bytes: u64,
    },
    /// A command line that the kernel would cut.
    #[error("the kernel's command line is {bytes} bytes long; this kernel takes {limit}")]
    CommandLine {
        /// Its length in bytes.
        bytes: u64,
        /// The most that the kernel takes.
        limit: u64,
    },
    /// A place for the VM generation identifier that is not memory.
    #[error("the VM generation identifier cannot be at {address:#x}: there is no memory")]
    NoMemoryAt {
        /// The guest-physical address.
        address: u64,
    },
    /// A command line with a NUL in it.
    #[error("the kernel's command line has a NUL in it")]
    CommandLineNul,
    /// ACPI tables for more devices than there is room for.
    #[error(
        "the machine has too many devices: its ACPI tables are {bytes} bytes long, {limit} are possible"
    )]
    AcpiTables {
        /// Their length in bytes.
        bytes: u64,
        /// The room for them in bytes.
        limit: u64,
    },
    /// A disk's file cannot be used.
    #[error("cannot {action} disk {name:?}: {source}")]
    Disk {
        /// Which disk.
        name: String,
        /// What was being done.
        action: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// A disk of a size that cannot be.
    #[error(
        "disk {name:?} is {bytes} bytes long; a disk is a multiple of 512 bytes from 512 bytes to 8 TiB"
    )]
    DiskSize {
        /// Which disk.
        name: String,
        /// Its size in bytes.
        bytes: u64,
    },
    /// A disk's file is in use by another machine.
    #[error(
        "disk {name:?} is in use by another machine; stop that one, or give each a copy or an overlay"
    )]
    DiskBusy {
        /// Which disk.
        name: String,
    },
    /// A disk that is written in place cannot be frozen.
    #[error(
        "disk {name:?} is written in place and cannot be part of a snapshot; run the machine with an overlay over it"
    )]
    DiskInPlace {
        /// Which disk.
        name: String,
    },
    /// This host has no taps, or not for this user.
    #[error("cannot open /dev/net/tun: {source}; `modprobe tun` provides it")]
    NoTaps {
        /// The operating system's error.
        source: io::Error,
    },
    /// There is no such tap.
    #[error(
        "there is no tap named {name}; make it with `ip tuntap add {name} mode tap`, then `ip link set {name} up`"
    )]
    NoTap {
        /// Its name.
        name: String,
    },
    /// A tap that another process has.
    #[error(
        "the tap {name} is in use by another process; stop that one, or make another tap with `ip tuntap add NAME mode tap`"
    )]
    TapBusy {
        /// Its name.
        name: String,
    },
    /// An interface that is no tap.
    #[error(
        "{name} is no tap, or one with several queues; make a tap with `ip tuntap add NAME mode tap`"
    )]
    NotATap {
        /// Its name.
        name: String,
    },
    /// A tap of another user.
    #[error(
        "no right to use the tap {name}: {source}; run as root, or make it with `ip tuntap add {name} mode tap user USER`"
    )]
    TapDenied {
        /// Its name.
        name: String,
        /// The operating system's error.
        source: io::Error,
    },
    /// A tap cannot be used.
    #[error("cannot {action} the tap {name}: {source}")]
    Tap {
        /// Its name.
        name: String,
        /// What was being done.
        action: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// More virtio devices than there are interrupts for.
    #[error("{devices} virtio devices are not possible; at most {limit} are")]
    VirtioDevices {
        /// The number asked for.
        devices: usize,
        /// The most that are possible.
        limit: usize,
    },
    /// A serial port's state that cannot be.
    #[error("the VM state is not valid: a serial port cannot be in the state it names")]
    SerialState,
    /// The machine has ended.
    #[error("the machine has ended: {0}")]
    Ended(crate::ending::Ending),
    /// The machine could not be stopped in time; it goes on.
    #[error(
        "the machine does not stop: it waits for a page of its snapshot that the server of the \
         mount does not give, or for its disk; look after that server and try again, or \
         `snapstore stop` the machine"
    )]
    DoesNotStop,
    /// The host could not do what the guest asked of a device. The guest stands still
    /// until someone resumes it, and then what it asked is done once more.
    #[error(
        "the machine stands still, since the host failed it ({what}); mend that, then `snapstore resume` it"
    )]
    HostFailed {
        /// What could not be done, and why.
        what: String,
    },
    /// A machine's process does not answer.
    #[error("the machine at {} does not answer; `snapstore stop` ends it whatever it does", path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
    },
    /// Nobody listens at a machine's socket.
    #[error("no machine is running at {}", path.display())]
    NoMachine {
        /// The socket.
        path: PathBuf,
    },
    /// A machine said no.
    #[error("{message}")]
    Refused {
        /// Which kind of no.
        kind: crate::control::ErrorKind,
        /// What it said.
        message: String,
    },
    /// A process with several threads cannot be multiplied.
    #[error("cannot fork a process of {threads} threads")]
    Threads {
        /// How many it has.
        threads: usize,
    },
    /// This kernel's KVM is too old.
    #[error("KVM of this kernel lacks {name}; use Linux 5.10 or newer")]
    Capability {
        /// The capability.
        name: &'static str,
    },
    /// What needs a paused machine was asked of a running one.
    #[error("the machine is running; pause it first")]
    NotPaused,
    /// A machine state that cannot be used.
    #[error(transparent)]
    State(#[from] crate::state::StateError),
}

/// Adds to an operating system's error what was being done.
pub(crate) trait OsContext<T> {
    /// An error of the operating system.
    fn os(self, action: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> OsContext<T> for Result<T, E> {
    fn os(self, action: &'static str) -> Result<T> {
        self.map_err(|source| Error::Os {
            action,
            source: source.into(),
        })
    }
}

/// Adds to an error of KVM what was asked of it.
pub(crate) trait KvmContext<T> {
    /// An error of KVM.
    fn kvm(self, action: &'static str) -> Result<T>;
}

impl<T> KvmContext<T> for Result<T, kvm_ioctls::Error> {
    fn kvm(self, action: &'static str) -> Result<T> {
        self.map_err(|errno| Error::Kvm {
            action,
            source: io::Error::from_raw_os_error(errno.errno()),
        })
    }
}
