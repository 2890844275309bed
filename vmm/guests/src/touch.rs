//! The commands of the `touch` guest; the protocol is in `asm/touch.S`.

/// A command to the `touch` guest. Pages are 4096 bytes and are numbered from
/// guest physical address 0; they must lie in RAM below 3 GiB. Pages 256 to 511
/// hold the guest itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TouchCommand {
    /// Stores `value` plus the page's number in the first word of each page.
    /// Answer: `w<count>`, in decimal.
    Write {
        /// How many pages.
        count: u32,
        /// The first page's number.
        first: u32,
        /// What is added to each page's number.
        value: u32,
    },
    /// Adds up the first words of the pages. Answer: `r<sum>`, eight hexadecimal
    /// digits; [`page_sum`] gives what it is after a `Write`.
    Read {
        /// How many pages.
        count: u32,
        /// The first page's number.
        first: u32,
    },
    /// Adds up the first words of as many pages, of which the i-th is `first` plus the
    /// bits of i times `stride` that are in `mask`. Answer: `s<sum>`.
    ReadScattered {
        /// How many pages.
        count: u32,
        /// The lowest page's number.
        first: u32,
        /// How far apart two pages are.
        stride: u32,
        /// What their distances from the first are cut to.
        mask: u32,
    },
    /// Fills each page whole with the number of the round, from 0.
    /// Answer: `b`.
    Fill {
        /// How many pages.
        count: u32,
        /// The first page's number.
        first: u32,
        /// How often all of them are filled.
        rounds: u32,
    },
    /// Halts with interrupts off, for good. No answer.
    Halt,
    /// Resets the machine. No answer.
    Quit,
}

impl TouchCommand {
    /// The bytes to send to the guest's serial port.
    pub fn encode(self) -> Vec<u8> {
        let (letter, numbers) = match self {
            TouchCommand::Write {
                count,
                first,
                value,
            } => (b'w', vec![count, first, value]),
            TouchCommand::Read { count, first } => (b'r', vec![count, first]),
            TouchCommand::ReadScattered {
                count,
                first,
                stride,
                mask,
            } => (b's', vec![count, first, stride, mask]),
            TouchCommand::Fill {
                count,
                first,
                rounds,
            } => (b'b', vec![count, first, rounds]),
            TouchCommand::Halt => (b'h', vec![]),
            TouchCommand::Quit => (b'q', vec![]),
        };
        let numbers = numbers.into_iter().flat_map(u32::to_le_bytes);
        std::iter::once(letter).chain(numbers).collect()
    }
}

/// What `Read` answers about pages that a `Write` with the same `value` stored.
pub fn page_sum(count: u32, first: u32, value: u32) -> u32 {
    let words = (0..count).map(|i| first.wrapping_add(i).wrapping_add(value));
    words.fold(0, u32::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_a_letter_and_little_endian_numbers() {
        let write = TouchCommand::Write {
            count: 2,
            first: 0x1_0203,
            value: 0xffff_fffe,
        };
        assert_eq!(write.encode(), b"w\x02\0\0\0\x03\x02\x01\0\xfe\xff\xff\xff");
        assert_eq!(
            TouchCommand::Read {
                count: 1,
                first: 512
            }
            .encode(),
            b"r\x01\0\0\0\0\x02\0\0"
        );
        assert_eq!(TouchCommand::Quit.encode(), b"q");
    }

    #[test]
    fn sums_wrap() {
        assert_eq!(page_sum(3, 512, 0), 512 + 513 + 514);
        assert_eq!(page_sum(2, 1, u32::MAX), 1);
        assert_eq!(page_sum(0, 1, 1), 0);
    }
}
