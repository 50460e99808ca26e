//! The innermost loop of everything: one register tile of a matrix product.
//!
//! A kernel adds `A B` to an `mr x nr` tile of `C`, where `A` is packed as `k` columns of `mr`
//! values and `B` as `k` rows of `nr` values (the BLIS layout):
//! ```text
//! for p in 0..k { for r in 0..mr { for c in 0..nr { C[r, c] += A[p, r] * B[p, c] } } }
//! ```
//! `scalar` is that loop and the oracle of the others. The choice is made at run time, so one
//! wheel serves every CPU; `RSPRUNE_KERNEL=scalar|neon|avx2|avx512` overrides it to test each path.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::error::{Error, Result};

/// Values that a tile asks for with every one of its `k` steps: a cache line every four. Spread out,
/// because a burst of requests before the loop held up the loads of its first quarter.
pub const ASKED_A_STEP: usize = 4;

/// Adds `k` outer products to a tile: `(k, a_packed, b_packed, c, row_stride_of_c, next)`, and asks
/// for `ASKED_A_STEP * k` values from `next` on to be brought into the second-level cache.
///
/// # Safety
/// `a` holds `k * mr` values, `b` holds `k * nr`, and `c` points at `mr` rows of `nr` values
/// that lie `stride` apart; the CPU has the features of the kernel.
pub type TileFn = unsafe fn(usize, *const f32, *const f32, *mut f32, usize, *const f32);

/// Writes `mr` rows as `k` columns of `mr` values: `(k, rows, row_stride, out)`.
///
/// # Safety
/// `rows` points at `mr` rows of `k` values that lie `stride` apart, and `out` has room for `k * mr`
/// values; the CPU has the features of the kernel.
pub type PanelFn = unsafe fn(usize, *const f32, usize, *mut f32);

/// A tile kernel and the shape of its tile.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// The name that `RSPRUNE_KERNEL` takes.
    pub name: &'static str,
    /// Rows of the register tile.
    pub mr: usize,
    /// Columns of the register tile.
    pub nr: usize,
    tile: TileFn,
    panel: PanelFn,
    features: Features,
}

/// Instruction sets for which loops are compiled; see [`Kernel::vectorised`].
#[derive(Clone, Copy)]
enum Features {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    /// The fastest kernel of this CPU, or the one that `RSPRUNE_KERNEL` names.
    pub fn select() -> Result<Kernel> {
        let available = Kernel::available();
        match std::env::var("RSPRUNE_KERNEL") {
            Ok(name) if !name.is_empty() => {
                available.iter().find(|k| k.name == name).copied().ok_or_else(|| {
                    let names: Vec<_> = available.iter().map(|k| k.name).collect();
                    Error::Option(format!(
                        "RSPRUNE_KERNEL={name}: this CPU has {}",
                        names.join(", ")
                    ))
                })
            }
            _ => Ok(available[0]),
        }
    }

    /// All kernels that this CPU can run, fastest first.
    pub fn available() -> Vec<Kernel> {
        let mut kernels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        kernels.extend(x86_64::available());
        #[cfg(target_arch = "aarch64")]
        kernels.extend(aarch64::available());
        kernels.push(scalar::KERNEL);
        kernels
    }

    /// Runs `pass`, compiled for this kernel's instruction set: for loops over the elements of a
    /// row, which beside a fast product take a quarter of a solver's time where they are compiled
    /// for the oldest CPU. Short closures only: they must be inlined to gain anything.
    #[inline]
    #[allow(unsafe_code)] // a call to a function with target features
    pub fn vectorised<T>(&self, pass: impl FnOnce() -> T) -> T {
        match self.features {
            Features::Baseline => pass(),
            // SAFETY: a kernel with these features is listed only where the CPU has them.
            #[cfg(target_arch = "x86_64")]
            Features::Avx2 => unsafe { x86_64::with_avx2(pass) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Features::Avx512 => unsafe { x86_64::with_avx512(pass) },
        }
    }

    /// Overwrites `panel [k, mr]` with the transpose of `mr` rows of `k` values, `stride` apart.
    #[allow(unsafe_code)] // lengths are checked here, CPU features when the kernel was listed
    pub fn panel(&self, k: usize, rows: &[f32], stride: usize, panel: &mut [f32]) {
        assert!(rows.len() >= (self.mr - 1) * stride + k && panel.len() >= k * self.mr);
        // SAFETY: the assertion is the contract of `PanelFn`.
        unsafe { (self.panel)(k, rows.as_ptr(), stride, panel.as_mut_ptr()) }
    }

    /// `C[0..mr, 0..nr] += A B` on packed panels; `c` starts at the tile's corner. `next` will be wanted
    /// soon (its first `ASKED_A_STEP * k` values); only a hint.
    #[allow(unsafe_code)] // lengths are checked here, CPU features when the kernel was listed
    pub fn tile(
        &self,
        k: usize,
        (a, b): (&[f32], &[f32]),
        c: &mut [f32],
        stride: usize,
        next: &[f32],
    ) {
        assert!(a.len() >= k * self.mr && b.len() >= k * self.nr && stride >= self.nr);
        assert!(c.len() >= (self.mr - 1) * stride + self.nr);
        // SAFETY: the two assertions are the contract of `TileFn`.
        unsafe { (self.tile)(k, a.as_ptr(), b.as_ptr(), c.as_mut_ptr(), stride, next.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_panel_is_the_transpose_of_its_rows(k in 1usize..70, pad in 0usize..5) {
            for kernel in Kernel::available() {
                let stride = k + pad;
                let rows: Vec<f32> = (0..(kernel.mr - 1) * stride + k).map(|i| i as f32).collect();
                let mut panel = vec![-1.0; k * kernel.mr + 3];
                kernel.panel(k, &rows, stride, &mut panel);
                for (i, value) in panel.iter().enumerate() {
                    let (p, r) = (i / kernel.mr, i % kernel.mr);
                    let expected = if p < k { (r * stride + p) as f32 } else { -1.0 };
                    prop_assert_eq!(*value, expected, "{}: {} {}", kernel.name, p, r);
                }
            }
        }

        #[test]
        fn every_kernel_agrees_with_the_scalar_twin(k in 0usize..70, pad in 0usize..5, seed: u64) {
            for kernel in Kernel::available() {
                let value = |i: usize| {
                    let h = (i as u64 + 1).wrapping_mul(seed | 1) >> 40;
                    h as f32 / (1u64 << 24) as f32 - 0.5
                };
                let a: Vec<f32> = (0..k * kernel.mr).map(value).collect();
                let b: Vec<f32> = (0..k * kernel.nr).map(|i| value(i + 7919)).collect();
                let stride = kernel.nr + pad;
                let mut c: Vec<f32> = (0..kernel.mr * stride).map(|i| value(i + 31)).collect();
                let start = c.clone();
                kernel.tile(k, (&a, &b), &mut c, stride, &[]);
                for r in 0..kernel.mr {
                    for j in 0..stride {
                        let mut sum = f64::from(start[r * stride + j]);
                        for p in 0..(if j < kernel.nr { k } else { 0 }) {
                            sum += f64::from(a[p * kernel.mr + r]) * f64::from(b[p * kernel.nr + j]);
                        }
                        let found = f64::from(c[r * stride + j]);
                        prop_assert!((found - sum).abs() < 1e-4, "{} {found} {sum}", kernel.name);
                    }
                }
            }
        }
    }
}
