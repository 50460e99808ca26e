//! The floating-point types in which weights are stored, and rounding to them.

use crate::error::{Error, Result};

/// How a weight is stored. All arithmetic is f32; results are rounded to this type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// IEEE single precision.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Float {
    /// The type with this safetensors name.
    pub fn parse(name: &str) -> Result<Float> {
        match name {
            "F32" => Ok(Float::F32),
            "BF16" => Ok(Float::Bf16),
            "F16" => Ok(Float::F16),
            _ => Err(Error::Option(format!(
                "dtype {name}: weights must be stored as F32, BF16 or F16"
            ))),
        }
    }

    /// The name in safetensors files.
    pub fn name(self) -> &'static str {
        match self {
            Float::F32 => "F32",
            Float::Bf16 => "BF16",
            Float::F16 => "F16",
        }
    }

    /// Bytes of one number.
    pub fn size(self) -> usize {
        if self == Float::F32 { 4 } else { 2 }
    }

    /// `value` as this type would store it, round to nearest even.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Float::F32 => value,
            Float::Bf16 => half::bf16::from_f32(value).to_f32(),
            Float::F16 => half::f16::from_f32(value).to_f32(),
        }
    }

    /// The 16-bit pattern of `value`; only for the two half types.
    pub fn to_bits(self, value: f32) -> u16 {
        match self {
            Float::F16 => half::f16::from_f32(value).to_bits(),
            Float::Bf16 | Float::F32 => half::bf16::from_f32(value).to_bits(),
        }
    }

    /// The value of a 16-bit pattern; only for the two half types.
    pub fn from_bits(self, bits: u16) -> f32 {
        match self {
            Float::F16 => half::f16::from_bits(bits).to_f32(),
            Float::Bf16 | Float::F32 => half::bf16::from_bits(bits).to_f32(),
        }
    }
}

/// The flat index of the first NaN or infinity.
pub fn first_non_finite(values: &[f32]) -> Option<usize> {
    // The largest bit pattern without its sign tells, and integers vectorise where sums may not.
    let magnitude = |v: &f32| v.to_bits() & 0x7fff_ffff;
    if values.iter().map(magnitude).fold(0, u32::max) < f32::INFINITY.to_bits() {
        return None;
    }
    values.iter().position(|v| !v.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_what_storing_does() {
        for v in [0.1f32, -2.71, 1e-8, 65504.0, 1.0] {
            for kind in [Float::Bf16, Float::F16] {
                assert_eq!(kind.round(v), kind.from_bits(kind.to_bits(v)));
            }
            assert_eq!(Float::F32.round(v), v);
        }
    }

    #[test]
    fn the_first_non_finite_value_is_found() {
        let mut v = vec![1.0f32; 10_000];
        assert_eq!(first_non_finite(&v), None);
        v[9_000] = f32::NEG_INFINITY;
        v[9_500] = f32::NAN;
        assert_eq!(first_non_finite(&v), Some(9_000));
    }
}
