//! The first serial port, a 16550, with its interrupt line.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vm_superio::Serial;
use vm_superio::serial::{NoEvents, SerialState as Registers};

use crate::devices::Console;
use crate::devices::irq::IrqLine;
use crate::error::{Error, Result};
use crate::state::SerialState;

/// The interrupt of COM1 on every PC.
const IRQ: u32 = 4;
/// Input that waits for the guest to read it, in bytes.
const PENDING_BYTES: usize = 64 << 10;

struct Printer(Arc<Console>);

impl Write for Printer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) struct SerialPort {
    inner: Mutex<Inner>,
}

struct Inner {
    port: Serial<IrqLine, NoEvents, Printer>,
    /// What the port's own buffer could hold, in bytes.
    capacity: usize,
    /// Input that is not in the port yet.
    pending: VecDeque<u8>,
}

impl Inner {
    /// Gives the port one byte of input, if it has none: it interrupts the guest when a
    /// byte comes, not for those that a driver which reads so many at a time has left.
    fn fill(&mut self) {
        if self.port.fifo_capacity() < self.capacity {
            return;
        }
        if let Some(&byte) = self.pending.front() {
            // In loopback mode the port takes no input from outside.
            match self.port.enqueue_raw_bytes(&[byte]) {
                Ok(0) => {}
                Ok(_) => drop(self.pending.pop_front()),
                Err(error) => tracing::debug!(?error, "serial input waits"),
            }
        }
    }
}

impl SerialPort {
    pub fn new(vm: &Arc<VmFd>, console: &Arc<Console>) -> Self {
        let port = Serial::new(IrqLine::new(vm, IRQ), Printer(console.clone()));
        let capacity = port.fifo_capacity();
        Self::with(port, capacity, VecDeque::new())
    }

    pub fn from_state(vm: &Arc<VmFd>, console: &Arc<Console>, state: &SerialState) -> Result<Self> {
        let registers = Registers {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        };
        let printer = Printer(console.clone());
        let port = Serial::from_state(&registers, IrqLine::new(vm, IRQ), NoEvents, printer)
            .map_err(|_| Error::SerialState)?;
        let capacity = port.fifo_capacity() + state.in_buffer.len();
        Ok(Self::with(
            port,
            capacity,
            state.pending_input.iter().copied().collect(),
        ))
    }

    fn with(
        port: Serial<IrqLine, NoEvents, Printer>,
        capacity: usize,
        pending: VecDeque<u8>,
    ) -> Self {
        Self {
            inner: Mutex::new(Inner {
                port,
                capacity,
                pending,
            }),
        }
    }

    pub fn state(&self) -> SerialState {
        let inner = self.lock();
        let registers = inner.port.state();
        SerialState {
            baud_divisor_low: registers.baud_divisor_low,
            baud_divisor_high: registers.baud_divisor_high,
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            in_buffer: registers.in_buffer,
            pending_input: inner.pending.iter().copied().collect(),
        }
    }

    /// Input from outside; returns how many bytes were taken.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut inner = self.lock();
        let taken = bytes
            .len()
            .min(PENDING_BYTES.saturating_sub(inner.pending.len()));
        inner.pending.extend(&bytes[..taken]);
        inner.fill();
        taken
    }

    pub fn read(&self, register: u8, data: &mut [u8]) {
        let mut inner = self.lock();
        for byte in data {
            *byte = inner.port.read(register);
            inner.fill();
        }
    }

    pub fn write(&self, register: u8, data: &[u8]) {
        let mut inner = self.lock();
        for &byte in data {
            if let Err(error) = inner.port.write(register, byte) {
                tracing::debug!(?error, "serial output");
            }
        }
        // It may have left loopback mode.
        inner.fill();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
