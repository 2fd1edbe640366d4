//! MD5 (RFC 1321), which clients may send as a checksum of an upload. Not for anything that must
//! hold against an attacker: SHA-256 is what we keep.

/// Rotations of the four rounds.
const ROTATIONS: [[u32; 4]; 4] =
    [[7, 12, 17, 22], [5, 9, 14, 20], [4, 11, 16, 23], [6, 10, 15, 21]];

/// A running checksum.
pub(super) struct Md5 {
    state: [u32; 4],
    block: Vec<u8>,
    bytes: u64,
}

impl Md5 {
    pub(super) fn new() -> Self {
        let state = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
        Self { state, block: Vec::with_capacity(64), bytes: 0 }
    }

    pub(super) fn update(&mut self, mut piece: &[u8]) {
        self.bytes += piece.len() as u64;
        while !piece.is_empty() {
            let (now, later) = piece.split_at(piece.len().min(64 - self.block.len()));
            self.block.extend_from_slice(now);
            piece = later;
            if self.block.len() == 64 {
                self.round();
                self.block.clear();
            }
        }
    }

    /// As 32 hexadecimal digits.
    pub(super) fn finish(mut self) -> String {
        let bits = self.bytes.wrapping_mul(8);
        self.update(&[0x80]);
        while self.block.len() != 56 {
            self.update(&[0]);
        }
        self.update(&bits.to_le_bytes());
        let bytes = self.state.iter().flat_map(|word| word.to_le_bytes());
        bytes.map(|byte| format!("{byte:02x}")).collect()
    }

    fn round(&mut self) {
        let words: Vec<u32> = self
            .block
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        let [mut a, mut b, mut c, mut d] = self.state;
        for i in 0..64 {
            let (mix, word) = match i / 16 {
                0 => ((b & c) | (!b & d), i),
                1 => ((d & b) | (!d & c), (5 * i + 1) % 16),
                2 => (b ^ c ^ d, (3 * i + 5) % 16),
                _ => (c ^ (b | !d), (7 * i) % 16),
            };
            // The integer part of 2^32 |sin(i + 1)|, as the paper defines it.
            let constant = (f64::from(i as u32 + 1).sin().abs() * 4_294_967_296.0) as u32;
            let sum = a.wrapping_add(mix).wrapping_add(constant).wrapping_add(words[word]);
            let turned = sum.rotate_left(ROTATIONS[i / 16][i % 4]);
            (a, d, c, b) = (d, c, b, b.wrapping_add(turned));
        }
        for (state, word) in self.state.iter_mut().zip([a, b, c, d]) {
            *state = state.wrapping_add(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_paper() {
        let digits = "1234567890".repeat(8);
        for (text, sum) in [
            ("", "d41d8cd98f00b204e9800998ecf8427e"),
            ("a", "0cc175b9c0f1b6a831c399e269772661"),
            ("abc", "900150983cd24fb0d6963f7d28e17f72"),
            ("message digest", "f96b697d7cb7938d525a2f31aaf161d0"),
            (&digits, "57edf4a22be3c955ac49da2e2107b67a"),
        ] {
            for step in [1, 7, 64, 100] {
                let mut md5 = Md5::new();
                text.as_bytes().chunks(step).for_each(|piece| md5.update(piece));
                assert_eq!(md5.finish(), sum, "{text} by {step}");
            }
        }
    }
}
