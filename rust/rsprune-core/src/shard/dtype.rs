//! The element types of safetensors.

use crate::error::Error;
use std::fmt;
use std::str::FromStr;

/// An element type, named as in the files. Types of less than a byte (`F4`, `F6_*`) are refused
/// by name: their tensors do not start on byte boundaries for every shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are the documentation
pub enum Dtype {
    Bool,
    U8,
    I8,
    F8E5M2,
    F8E4M3,
    F8E8M0,
    F8E4M3Fnuz,
    F8E5M2Fnuz,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

/// Every type with its name in files and its bytes per element.
const TABLE: [(Dtype, &str, u64); 19] = [
    (Dtype::Bool, "BOOL", 1),
    (Dtype::U8, "U8", 1),
    (Dtype::I8, "I8", 1),
    (Dtype::F8E5M2, "F8_E5M2", 1),
    (Dtype::F8E4M3, "F8_E4M3", 1),
    (Dtype::F8E8M0, "F8_E8M0", 1),
    (Dtype::F8E4M3Fnuz, "F8_E4M3FNUZ", 1),
    (Dtype::F8E5M2Fnuz, "F8_E5M2FNUZ", 1),
    (Dtype::I16, "I16", 2),
    (Dtype::U16, "U16", 2),
    (Dtype::F16, "F16", 2),
    (Dtype::BF16, "BF16", 2),
    (Dtype::I32, "I32", 4),
    (Dtype::U32, "U32", 4),
    (Dtype::F32, "F32", 4),
    (Dtype::C64, "C64", 8),
    (Dtype::F64, "F64", 8),
    (Dtype::I64, "I64", 8),
    (Dtype::U64, "U64", 8),
];

impl Dtype {
    /// All types, in the table's order.
    pub fn all() -> impl Iterator<Item = Dtype> {
        TABLE.iter().map(|row| row.0)
    }

    /// The name in files, such as `BF16`.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// Bytes per element.
    pub fn size(self) -> u64 {
        TABLE[self as usize].2
    }

    /// The type of that name, if it is one.
    pub fn parse(name: &str) -> Option<Dtype> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// Bytes of a tensor of this type, or `None` if that number does not fit in 64 bits.
    pub fn nbytes(self, shape: &[u64]) -> Option<u64> {
        // A zero anywhere makes the tensor empty, but the other factors must fit as well: readers
        // multiply from the left and would fail on (2^40, 2^40, 0).
        let mut elements = 1u64;
        for &length in shape {
            elements = elements.checked_mul(length)?;
        }
        elements.checked_mul(self.size())
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Dtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Dtype, Error> {
        Dtype::parse(name).ok_or_else(|| Error::Option(unknown(name)))
    }
}

/// What to say of a name that is no type of ours.
pub(super) fn unknown(name: &str) -> String {
    if matches!(name, "F4" | "F6_E2M3" | "F6_E3M2") {
        return format!("dtype {name} packs values into less than a byte: not supported");
    }
    let known: Vec<&str> = TABLE.iter().map(|row| row.1).collect();
    format!("unknown dtype {name:?}, expected one of {}", known.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_at_their_own_discriminant() {
        for (i, (dtype, name, _)) in TABLE.iter().enumerate() {
            assert_eq!(*dtype as usize, i);
            assert_eq!(Dtype::parse(name), Some(*dtype));
            assert_eq!(name.parse::<Dtype>().unwrap().to_string(), *name);
        }
    }

    #[test]
    fn refuses_other_names() {
        for name in ["F4", "F6_E2M3", "F6_E3M2", "bf16", "F32 ", ""] {
            assert_eq!(Dtype::parse(name), None);
        }
        let message = "F4".parse::<Dtype>().unwrap_err().to_string();
        assert!(message.contains("less than a byte"), "{message}");
    }

    #[test]
    fn nbytes_is_checked() {
        assert_eq!(Dtype::F32.nbytes(&[]), Some(4));
        assert_eq!(Dtype::BF16.nbytes(&[3, 5]), Some(30));
        assert_eq!(Dtype::F64.nbytes(&[7, 0]), Some(0));
        assert_eq!(Dtype::U8.nbytes(&[u64::MAX, 2]), None);
        assert_eq!(Dtype::U64.nbytes(&[u64::MAX / 4]), None);
        assert_eq!(Dtype::U8.nbytes(&[1 << 40, 1 << 40, 0]), None);
    }
}
