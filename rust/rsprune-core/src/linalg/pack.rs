//! Panels: the order of elements in which a tile kernel reads its operands.

use crate::error::Result;
use crate::kernels::Kernel;
use crate::par::Job;
use std::ops::Range;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A zeroed f32 buffer that starts on a cache line, so no vector load straddles two.
struct Aligned {
    lines: Vec<Line>,
}

impl Aligned {
    fn zeros(len: usize) -> Aligned {
        Aligned { lines: vec![Line([0.0; 16]); len.div_ceil(16)] }
    }

    #[allow(unsafe_code)] // Line is 16 f32 without padding
    fn as_mut(&mut self) -> &mut [f32] {
        let len = self.lines.len() * 16;
        // SAFETY: `lines` owns exactly `len` consecutive f32.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }

    #[allow(unsafe_code)] // Line is 16 f32 without padding
    fn as_ref(&self) -> &[f32] {
        // SAFETY: as in `as_mut`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * 16) }
    }
}

/// The right operand `B [k, n]` in column panels of `nr`, the last one padded with zeros.
pub struct PackedB {
    /// Rows of B.
    pub k: usize,
    /// Columns of B.
    pub n: usize,
    nr: usize,
    data: Aligned,
}

impl PackedB {
    /// Packs `k` rows of `n` values that lie `stride` apart.
    pub fn new(kernel: &Kernel, b: &[f32], k: usize, n: usize, stride: usize) -> PackedB {
        let nr = kernel.nr;
        let mut data = Aligned::zeros(n.div_ceil(nr) * nr * k);
        // Room comes in whole cache lines: there may be more of it than panels.
        let panels = data.as_mut().chunks_exact_mut((nr * k).max(1)).take(n.div_ceil(nr));
        for (j, panel) in panels.enumerate() {
            let (c0, c1) = (j * nr, ((j + 1) * nr).min(n));
            for (p, row) in panel.chunks_exact_mut(nr).enumerate() {
                row[..c1 - c0].copy_from_slice(&b[p * stride + c0..p * stride + c1]);
            }
        }
        PackedB { k, n, nr, data }
    }

    /// `B [k, n]` whose entries `fill(rows, columns, tile)` writes, a tile of a panel at a time; so
    /// the matrix itself need not be in memory beside its packed form.
    pub fn filled(
        job: &Job,
        kernel: &Kernel,
        (k, n): (usize, usize),
        fill: impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync,
    ) -> Result<PackedB> {
        const TILE: usize = 64;
        let nr = kernel.nr;
        let used = n.div_ceil(nr) * nr * k;
        let mut data = Aligned::zeros(used);
        job.map_blocks(&mut data.as_mut()[..used], (nr * k).max(1), |j, panel| {
            for (t, tile) in panel.chunks_mut(TILE * nr).enumerate() {
                let rows = t * TILE..t * TILE + tile.len() / nr;
                fill(rows, j * nr..((j + 1) * nr).min(n), tile);
            }
            Ok(())
        })?;
        Ok(PackedB { k, n, nr, data })
    }

    /// Elements from one row of a panel to its next.
    pub fn panel_width(kernel: &Kernel) -> usize {
        kernel.nr
    }

    /// Rows `k0..k1` of column panel `j`.
    pub(super) fn panel(&self, j: usize, k0: usize, k1: usize) -> &[f32] {
        let start = j * self.nr * self.k;
        &self.data.as_ref()[start + k0 * self.nr..start + k1 * self.nr]
    }
}

/// Room for one packed block of the left operand; reused from call to call.
#[derive(Default)]
pub struct Scratch {
    a: Vec<f32>,
}

impl Scratch {
    /// Packs columns `k0..k1` of `rows` rows (`stride` apart) into panels of `mr` rows.
    pub(super) fn pack_rows(
        &mut self,
        kernel: &Kernel,
        a: &[f32],
        rows: usize,
        (k0, k1): (usize, usize),
        stride: usize,
    ) -> &[f32] {
        let mr = kernel.mr;
        let panel_len = mr * (k1 - k0);
        self.a.clear();
        self.a.resize(rows.div_ceil(mr) * panel_len, 0.0);
        for (i, panel) in self.a.chunks_exact_mut(panel_len.max(1)).enumerate() {
            if (i + 1) * mr <= rows {
                kernel.panel(k1 - k0, &a[i * mr * stride + k0..], stride, panel);
                continue;
            }
            for r in 0..rows - i * mr {
                let row = &a[(i * mr + r) * stride..][k0..k1];
                for (p, &v) in row.iter().enumerate() {
                    panel[p * mr + r] = v;
                }
            }
        }
        &self.a
    }

    /// Packs columns `c0..c1` of a `[k, *]` matrix, transposed, into panels of `mr` columns.
    pub(super) fn pack_columns(
        &mut self,
        mr: usize,
        a: &[f32],
        k: usize,
        (c0, c1): (usize, usize),
        stride: usize,
    ) -> &[f32] {
        let panel_len = mr * k;
        self.a.clear();
        self.a.resize((c1 - c0).div_ceil(mr) * panel_len, 0.0);
        // Rows outermost: a row's columns lie side by side, a panel's rows far apart.
        for (p, row) in a.chunks(stride).take(k).enumerate() {
            for (i, columns) in row[c0..c1].chunks(mr).enumerate() {
                self.a[i * panel_len + p * mr..][..columns.len()].copy_from_slice(columns);
            }
        }
        &self.a
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_narrow_row_has_no_panel_beyond_its_end() {
        for kernel in Kernel::available() {
            for n in 1..=3 * kernel.nr {
                let row: Vec<f32> = (0..n).map(|j| j as f32 + 1.0).collect();
                let packed = PackedB::new(&kernel, &row, 1, n, n);
                let last = packed.panel((n - 1) / kernel.nr, 0, 1);
                assert_eq!(last[(n - 1) % kernel.nr], n as f32, "{}", kernel.name);
            }
        }
    }
}
