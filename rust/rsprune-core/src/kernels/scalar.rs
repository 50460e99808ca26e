//! The obvious loops, on arrays small enough that a compiler keeps them in registers.

use super::{Features, Kernel};

const MR: usize = 4;
const NR: usize = 8;

pub(super) const KERNEL: Kernel = Kernel {
    name: "scalar",
    mr: MR,
    nr: NR,
    tile,
    panel: panel::<MR>,
    features: Features::Baseline,
};

/// Element by element; serves every kernel that has no better way.
#[allow(unsafe_code)] // the signature of PanelFn
pub(super) unsafe fn panel<const MR: usize>(
    k: usize,
    rows: *const f32,
    stride: usize,
    out: *mut f32,
) {
    for r in 0..MR {
        for p in 0..k {
            // SAFETY: the caller keeps the contract of `PanelFn`.
            unsafe { *out.add(p * MR + r) = *rows.add(r * stride + p) };
        }
    }
}

#[allow(unsafe_code)] // the signature of TileFn
unsafe fn tile(
    k: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    stride: usize,
    _next: *const f32,
) {
    // SAFETY: the caller keeps the contract of `TileFn`.
    let (a, b) =
        unsafe { (std::slice::from_raw_parts(a, k * MR), std::slice::from_raw_parts(b, k * NR)) };
    let mut sum = [[0.0f32; NR]; MR];
    for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NR)) {
        for (row, &x) in sum.iter_mut().zip(a) {
            for (s, &y) in row.iter_mut().zip(b) {
                *s += x * y;
            }
        }
    }
    for (r, row) in sum.iter().enumerate() {
        for (j, s) in row.iter().enumerate() {
            // SAFETY: as above; the tile lies inside of C.
            unsafe { *c.add(r * stride + j) += s };
        }
    }
}
