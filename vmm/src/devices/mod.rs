//! What the guest finds on its buses besides the interrupt controllers and the
//! timer, which KVM emulates.
//!
//! A guest may write anything to any port or address. What no device claims
//! reads as ones and ignores writes, as on an empty bus.

mod console;
mod effect;
mod irq;
mod power;
mod serial;
pub mod virtio;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use vm_superio::{I8042Device, Trigger};

use crate::addresses::READY_PORT;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::rate::Rate;
use crate::state::{DeviceState, MAX_VIRTIO_DEVICES, SerialState, StateError};
pub use console::Console;
pub(crate) use effect::Effect;
use irq::IrqLine;
use serial::SerialPort;
use virtio::{
    Disk, FrozenDisk, Host, Interface, Interrupt, Network, Transport, VIRTIO_MMIO_BASE,
    VIRTIO_MMIO_LEN, VirtioDevice, virtio_gsi,
};

const COM1: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;

/// Remembers that the keyboard controller's reset line was pulsed.
struct ResetLine(AtomicBool);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// All devices of a machine.
pub(crate) struct Devices {
    serial: SerialPort,
    keyboard: Mutex<I8042Device<ResetLine>>,
    /// In the order of their windows.
    virtio: Vec<Arc<Mutex<Transport>>>,
    /// In the same order.
    interfaces: Vec<Interface>,
    host: Host,
}

impl Devices {
    /// Devices as they are after power-on, virtio devices quiet.
    ///
    /// # Errors
    /// More virtio devices than are possible.
    pub fn new(
        vm: &Arc<VmFd>,
        console: &Arc<Console>,
        memory: &GuestMemory,
        virtio: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Self> {
        let mut transports = Vec::new();
        for (device, interrupt) in interrupts(vm, virtio)? {
            transports.push(Transport::new(device, memory.ram().clone(), interrupt));
        }
        Ok(Self::with(SerialPort::new(vm, console), transports))
    }

    /// Devices as they were when `state` was saved, virtio devices quiet. After
    /// the interrupt controllers were restored: some devices raise interrupts.
    ///
    /// # Errors
    /// A state that no serial port can have, or of other virtio devices.
    pub fn from_state(
        vm: &Arc<VmFd>,
        console: &Arc<Console>,
        memory: &GuestMemory,
        virtio: Vec<Box<dyn VirtioDevice>>,
        state: &DeviceState,
    ) -> Result<Self> {
        let serial = SerialPort::from_state(vm, console, &state.serial)?;
        let (expected, found) = (state.virtio.len(), virtio.len());
        if expected != found {
            return Err(StateError::VirtioCount { expected, found }.into());
        }
        let mut transports = Vec::new();
        let attached = interrupts(vm, virtio)?.into_iter().zip(&state.virtio);
        for (number, ((device, interrupt), saved)) in attached.enumerate() {
            let memory = memory.ram().clone();
            let transport = Transport::restore(device, memory, interrupt, saved);
            transports.push(transport.map_err(|what| StateError::VirtioDiffers {
                device: number,
                what,
            })?);
        }
        Ok(Self::with(serial, transports))
    }

    fn with(serial: SerialPort, mut transports: Vec<Transport>) -> Self {
        let host = Host::default();
        for transport in &mut transports {
            transport.set_host(host.clone());
        }
        let line = ResetLine(AtomicBool::new(false));
        let interfaces = transports.iter();
        let interfaces = interfaces.filter_map(|transport| transport.device().interface());
        Self {
            serial,
            interfaces: interfaces.collect(),
            host,
            keyboard: Mutex::new(I8042Device::new(line)),
            virtio: transports
                .into_iter()
                .map(|transport| Arc::new(Mutex::new(transport)))
                .collect(),
        }
    }

    /// Starts the devices' own threads.
    pub fn start_threads(&self) {
        self.virtio.iter().for_each(Transport::start_threads);
    }

    /// What a restored machine needs to be as this one. The vCPUs must be
    /// stopped, and the devices quiet.
    pub fn state(&self) -> DeviceState {
        let serial: SerialState = self.serial.state();
        let virtio = self.virtio.iter();
        DeviceState {
            serial,
            virtio: virtio.map(|device| lock(device).save()).collect(),
        }
    }

    /// What devices are told of the machine, and tell it.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// From here on no device touches guest memory or an interrupt. The vCPUs
    /// must be stopped. Returns whether that is so: a thread of a device may hang in
    /// guest memory that is not there. Then some devices are quiet, until
    /// [`Devices::resume`].
    pub fn quiesce(&self, deadline: Instant) -> bool {
        self.virtio.iter().all(|device| {
            let device = lock_until(device, deadline);
            device.map(|mut device| device.quiesce()).is_some()
        })
    }

    /// The machine was about to stop and goes on: devices do what waited for that, but
    /// for those whose thread hangs.
    pub fn catch_up(&self) {
        for device in &self.virtio {
            if let Some(mut device) = lock_until(device, Instant::now() + CATCH_UP_PATIENCE) {
                device.resume();
                device.catch_up();
            }
        }
    }

    /// The vCPUs are about to run: devices do what waited for that.
    pub fn resume(&self) {
        for device in &self.virtio {
            lock(device).resume();
        }
    }

    /// The disks, in the order of their windows.
    pub fn disks(&self) -> Vec<Disk> {
        let virtio = self.virtio.iter();
        virtio
            .filter_map(|device| lock(device).device().disk().cloned())
            .collect()
    }

    /// The network interfaces, in the order of their windows. Waits for no device.
    pub fn networks(&self) -> Vec<Network> {
        self.interfaces.iter().map(Interface::network).collect()
    }

    /// The disks of this instant. The devices must be quiet.
    ///
    /// # Errors
    /// [`Error::DiskInPlace`].
    pub fn freeze_disks(&self) -> Result<Vec<FrozenDisk>> {
        self.disks().iter().map(Disk::freeze).collect()
    }

    /// The guest reads an address without memory.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.virtio_at(address) {
            Some((device, offset)) => lock(device).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes to an address without memory.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.virtio_at(address) {
            lock(device).write(offset, data);
        }
    }

    /// The device whose window an address is in, and where in the window.
    fn virtio_at(&self, address: u64) -> Option<(&Mutex<Transport>, u64)> {
        let within = address.checked_sub(VIRTIO_MMIO_BASE)?;
        let number = usize::try_from(within / VIRTIO_MMIO_LEN).ok()?;
        Some((self.virtio.get(number)?, within % VIRTIO_MMIO_LEN))
    }

    /// Input for the serial port; returns how many bytes were taken, fewer than
    /// all when the guest does not read them.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.serial.input(bytes)
    }

    /// The guest reads a port. All devices have byte-wide registers: with a
    /// wider or a repeated access every byte is read from the same port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        if COM1.contains(&port) {
            self.serial.read(offset(port), data);
        } else if port == I8042_DATA || port == I8042_COMMAND {
            let mut keyboard = self.keyboard.lock().unwrap_or_else(PoisonError::into_inner);
            data.fill_with(|| keyboard.read(0));
        } else if power::is_port(port) {
            data.fill(0);
        } else {
            data.fill(0xff);
        }
    }

    /// The guest writes a port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Effect {
        if COM1.contains(&port) {
            self.serial.write(offset(port), data);
        } else if port == I8042_COMMAND {
            return self.keyboard_command(data);
        } else if power::is_port(port) {
            return power::write(port, data);
        } else if port == READY_PORT {
            return Effect::Ready;
        }
        Effect::None
    }

    fn keyboard_command(&self, data: &[u8]) -> Effect {
        let mut keyboard = self.keyboard.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in data {
            match keyboard.write(4, byte) {
                Ok(()) => {}
                Err(never) => match never {},
            }
        }
        if keyboard.reset_evt().0.swap(false, Ordering::Relaxed) {
            Effect::Reset
        } else {
            Effect::None
        }
    }
}

/// The devices, each with its interrupt.
fn interrupts(
    vm: &Arc<VmFd>,
    virtio: Vec<Box<dyn VirtioDevice>>,
) -> Result<Vec<(Box<dyn VirtioDevice>, Interrupt)>> {
    let devices = virtio.len();
    let with_interrupt = virtio.into_iter().enumerate().map(|(number, device)| {
        let gsi = virtio_gsi(number).ok_or(Error::VirtioDevices {
            devices,
            limit: MAX_VIRTIO_DEVICES,
        })?;
        let line = IrqLine::new(vm, gsi);
        let lost = Rate::default();
        let interrupt: Interrupt = Box::new(move || {
            if let Err(error) = line.trigger() {
                lost.log(|more| tracing::error!(gsi, %error, more, "an interrupt is lost"));
            }
        });
        Ok((device, interrupt))
    });
    with_interrupt.collect()
}

/// How long a device that is at work is waited for, to do what was postponed.
const CATCH_UP_PATIENCE: Duration = Duration::from_millis(50);
/// How often a lock is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(1);

/// The lock, if it can be had by then.
pub(crate) fn lock_until<T>(mutex: &Mutex<T>, deadline: Instant) -> Option<MutexGuard<'_, T>> {
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_RETRY),
        }
    }
}

fn lock(device: &Mutex<Transport>) -> MutexGuard<'_, Transport> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A port's register number within the serial port.
fn offset(port: u16) -> u8 {
    u8::try_from(port - COM1.start()).expect("the range has eight ports")
}
