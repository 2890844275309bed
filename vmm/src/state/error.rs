//! Why a machine state is refused.

/// A machine state that cannot be used, one variant per cause.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum StateError {
    /// The bytes are of something else.
    #[error(
        "this is not a machine state: it does not begin with the bytes \"SNAPVMST\"; name a file that `commit` wrote"
    )]
    NotAState,
    /// A format that this program does not know.
    #[error(
        "the machine state was made by a newer snapstore: it has format version {found}, this program reads versions up to {supported}; use the newer program"
    )]
    Version {
        /// The version in the bytes.
        found: u32,
        /// The newest version this program reads.
        supported: u32,
    },
    /// A part of the machine that this program does not know, or not of this version.
    #[error("the machine state was made by a newer snapstore: its part {kind:?} has version {version}, this program {}; use the newer program", known(*supported))]
    NewerPayload {
        /// Which part.
        kind: String,
        /// Its version in the bytes.
        version: u32,
        /// The newest version this program reads; 0 if it does not know the part.
        supported: usize,
    },
    /// A list of payloads that cannot be.
    #[error("the machine state has {what}; it is not genuine")]
    Payloads {
        /// What cannot be.
        what: &'static str,
    },
    /// A part that every machine has is not there.
    #[error("the machine state lacks its part {kind:?}; it is not genuine")]
    LacksPayload {
        /// Which part.
        kind: &'static str,
    },
    /// The bytes end early.
    #[error(
        "the machine state is cut short: {found} bytes of {expected}; copy it again, or commit again"
    )]
    Truncated {
        /// How many bytes there are.
        found: u64,
        /// How many there should be at least.
        expected: u64,
    },
    /// The length field is beyond what any state needs.
    #[error(
        "the machine state claims {bytes} bytes of content, at most {limit} are possible; it is damaged or not genuine"
    )]
    TooLarge {
        /// The length claimed, in bytes.
        bytes: u64,
        /// The most that is read, in bytes.
        limit: u64,
    },
    /// Bytes follow the state, or its content.
    #[error("{extra} bytes follow the end of the machine state; it is damaged or not genuine")]
    TrailingBytes {
        /// How many.
        extra: u64,
    },
    /// The checksum does not match.
    #[error(
        "the machine state is damaged: its checksum does not match; restore an undamaged copy, or commit again"
    )]
    Checksum,
    /// The content is not what the checksum's writer should have written.
    #[error(
        "the machine state was written by a program that is not compatible with this one: {source}"
    )]
    Malformed {
        /// What the parser says.
        source: postcard::Error,
    },
    /// The content reads, but is not what would be written for it.
    #[error(
        "the content of the machine state is not in its one valid form; the program that wrote it is not compatible"
    )]
    NotCanonical,
    /// A list in it is too long.
    #[error("vCPU {cpu} of the machine state has more than {limit} {what}; it is not genuine")]
    TooMany {
        /// The index of the vCPU.
        cpu: usize,
        /// Of what.
        what: &'static str,
        /// How many there can be.
        limit: usize,
    },
    /// An XSAVE area of a size that cannot be.
    #[error(
        "vCPU {cpu} of the machine state has an XSAVE area of {bytes} bytes; it is a multiple of 4 from 4096 to {limit}; it is not genuine"
    )]
    XsaveLength {
        /// The index of the vCPU.
        cpu: usize,
        /// Its length in bytes.
        bytes: usize,
        /// The greatest length in bytes.
        limit: usize,
    },
    /// A serial port's buffer that is too long.
    #[error(
        "the serial port of the machine state holds {bytes} bytes of input, at most {limit} are possible; it is not genuine"
    )]
    SerialInput {
        /// Its length in bytes.
        bytes: usize,
        /// The greatest length in bytes.
        limit: usize,
    },
    /// A VM generation identifier outside of the guest's memory.
    #[error(
        "the VM generation identifier of the machine state is at {address:#x}, where the machine has no memory; it is not genuine"
    )]
    VmGeneration {
        /// Its guest-physical address.
        address: u64,
    },
    /// More virtio devices than there are windows.
    #[error("the machine state has more than {limit} virtio devices; it is not genuine")]
    VirtioDevices {
        /// How many there can be.
        limit: usize,
    },
    /// A virtio device in a state that cannot be.
    #[error("virtio device {device} of the machine state has {what}; it is not genuine")]
    Virtio {
        /// Its number.
        device: usize,
        /// What cannot be.
        what: &'static str,
    },
    /// A machine with another number of virtio devices than it was saved with.
    #[error(
        "the snapshot has {expected} virtio devices, {found} are attached; attach the same disks and devices as when it was taken"
    )]
    VirtioCount {
        /// How many it was saved with.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// A virtio device that is not the one that was saved.
    #[error(
        "virtio device {device} of the snapshot differs in {what} from the one attached; attach the same disks and devices, in the same order, as when it was taken"
    )]
    VirtioDiffers {
        /// Its number.
        device: usize,
        /// In what.
        what: &'static str,
    },
    /// The interrupt controllers are not the three of a PC.
    #[error(
        "interrupt controller {index} of the machine state says that it is number {found}; it is not genuine"
    )]
    InterruptController {
        /// Which it should be, as KVM numbers them.
        index: u32,
        /// Which it says it is.
        found: u32,
    },
    /// A CPU of another maker.
    #[error(
        "the snapshot was taken on a CPU of {snapshot:?}, this host's is of {host:?}; restore it on a host of the same vendor"
    )]
    HostVendor {
        /// The vendor in the snapshot.
        snapshot: String,
        /// The host's vendor.
        host: String,
    },
    /// This host, or its KVM, lacks what the guest was told it has.
    #[error("this host lacks CPU features that the snapshot's guest uses: {}; restore it on a host that has them", features.join(", "))]
    HostLacks {
        /// Their names.
        features: Vec<String>,
    },
    /// This host has less than a guest was to be told at most.
    #[error("this host's CPU, or its KVM, lacks what --cpu asks for ({baseline}): {}; ask for less, or run it on a host that has them", features.join(", "))]
    BaselineLacks {
        /// What asks for them.
        baseline: String,
        /// Their names.
        features: Vec<String>,
    },
    /// KVM does not take features away from a guest.
    #[error("this host's KVM cannot keep CPU features from a guest ({}); leave --cpu out, or use a host whose KVM virtualises", features.join(", "))]
    CannotLimit {
        /// Those that the guest would have nevertheless.
        features: Vec<String>,
    },
    /// A feature that does not work without another one.
    #[error(
        "the CPU feature {feature} does not work without {needs}; ask --cpu for +{needs}, too, or leave +{feature} out"
    )]
    FeatureNeeds {
        /// The feature.
        feature: String,
        /// The one it needs.
        needs: String,
    },
    /// FPU state that this host has no room for.
    #[error(
        "the snapshot has {bytes} bytes of FPU state, this host's KVM takes {limit}; restore it on a host with at least the same CPU features"
    )]
    XsaveBeyondHost {
        /// The length of what is not zero, in bytes.
        bytes: usize,
        /// The length KVM takes, in bytes.
        limit: usize,
    },
    /// The TSC cannot be made to tick as fast as in the snapshot.
    #[error(
        "the snapshot's TSC runs at {snapshot_khz} kHz and this host's at {host_khz} kHz, and its CPU cannot scale it; restore it on a host with the same TSC frequency"
    )]
    TscFrequency {
        /// The frequency in the snapshot, in kHz.
        snapshot_khz: u32,
        /// The host's frequency, in kHz.
        host_khz: u32,
    },
    /// KVM refuses a model-specific register.
    #[error(
        "KVM does not let MSR {index:#x} be set to {value:#x}; the snapshot needs another CPU, a newer kernel, or it is not genuine"
    )]
    MsrRefused {
        /// Which register.
        index: u32,
        /// The value in the snapshot.
        value: u64,
    },
    /// KVM wants XSAVE areas of a size that has no place in a state.
    #[error(
        "this host's KVM has no XSAVE area of 4096 to {limit} bytes ({bytes} bytes); machines on it cannot be saved"
    )]
    HostXsave {
        /// The size KVM names, in bytes; 0 if it has none.
        bytes: i64,
        /// The greatest size in bytes.
        limit: usize,
    },
}

/// What this program knows of a part of the machine.
fn known(versions: usize) -> String {
    match versions {
        0 => "does not know this part".to_owned(),
        newest => format!("reads versions up to {newest}"),
    }
}
