//! Panels: the order of elements in which a tile kernel reads its operands.

use crate::buffer::{Buffer, Room};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::par::Job;
use std::ops::Range;

/// The right operand `B [k, n]` in column panels of `nr`, the last one padded with zeros.
pub struct PackedB {
    /// Rows of B.
    pub k: usize,
    /// Columns of B.
    pub n: usize,
    nr: usize,
    data: Buffer,
}

impl PackedB {
    /// Packs `k` rows of `n` values that lie `stride` apart.
    pub fn new(kernel: &Kernel, b: &[f32], k: usize, n: usize, stride: usize) -> PackedB {
        let nr = kernel.nr;
        let mut data = Buffer::memory(n.div_ceil(nr) * nr * k);
        for (j, panel) in data.chunks_exact_mut((nr * k).max(1)).enumerate() {
            let (c0, c1) = (j * nr, ((j + 1) * nr).min(n));
            for (p, row) in panel.chunks_exact_mut(nr).enumerate() {
                row[..c1 - c0].copy_from_slice(&b[p * stride + c0..p * stride + c1]);
            }
        }
        PackedB { k, n, nr, data }
    }

    /// The same, packed by the workers who will read it: a panel that lies in another core's cache is
    /// slow to come.
    pub fn shared(
        job: &Job,
        kernel: &Kernel,
        b: &[f32],
        (k, n): (usize, usize),
        stride: usize,
    ) -> Result<PackedB> {
        PackedB::filled(job, kernel, Room::Memory, (k, n), |rows, columns, tile| {
            for (p, row) in rows.zip(tile.chunks_exact_mut(kernel.nr)) {
                let values = &b[p * stride..][columns.clone()];
                row[..values.len()].copy_from_slice(values);
            }
        })
    }

    /// `B [k, n]` in `room`, whose entries `fill(rows, columns, tile)` writes, a tile of a panel at a
    /// time; so the matrix itself need not be in memory beside its packed form.
    pub fn filled(
        job: &Job,
        kernel: &Kernel,
        room: Room,
        (k, n): (usize, usize),
        fill: impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync,
    ) -> Result<PackedB> {
        const TILE: usize = 64;
        let nr = kernel.nr;
        let mut data = room.zeros(n.div_ceil(nr) * nr * k)?;
        job.map_blocks(&mut data, (nr * k).max(1), |j, panel| {
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
        &self.data[start + k0 * self.nr..start + k1 * self.nr]
    }

    /// `B[i, j]`.
    #[inline]
    pub fn at(&self, i: usize, j: usize) -> f32 {
        self.data[(j / self.nr * self.k + i) * self.nr + j % self.nr]
    }

    /// Calls `piece(first column, values)` along row `i`, a panel at a time.
    #[inline]
    pub fn along_row(&self, i: usize, mut piece: impl FnMut(usize, &[f32])) {
        for first in (0..self.n).step_by(self.nr) {
            let start = first * self.k + i * self.nr;
            piece(first, &self.data[start..start + self.nr.min(self.n - first)]);
        }
    }

    /// Copies `B[rows, columns]` to `out`, row after row.
    pub fn read(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let width = columns.len();
        let mut first = columns.start;
        while first < columns.end {
            // Panel outermost: its rows lie side by side.
            let (j, offset) = (first / self.nr, first % self.nr);
            let count = (self.nr - offset).min(columns.end - first);
            let panel = self.panel(j, rows.start, rows.end).chunks_exact(self.nr);
            for (row, out) in panel.zip(out.chunks_exact_mut(width)) {
                out[first - columns.start..][..count].copy_from_slice(&row[offset..offset + count]);
            }
            first += count;
        }
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
    fn a_packed_matrix_is_read_back() {
        for kernel in Kernel::available() {
            for (k, n) in [(1, 1), (7, 45), (40, 3 * kernel.nr)] {
                let b: Vec<f32> = (0..k * n).map(|i| i as f32).collect();
                let packed = PackedB::new(&kernel, &b, k, n, n);
                let (rows, columns) = (k / 3..k, n / 4..n - n / 5);
                let mut part = vec![0.0; rows.len() * columns.len()];
                packed.read(rows.clone(), columns.clone(), &mut part);
                for i in rows.clone() {
                    packed.along_row(i, |first, values| {
                        assert_eq!(values, &b[i * n + first..][..values.len()]);
                    });
                    for j in columns.clone() {
                        let at = (i - rows.start) * columns.len() + j - columns.start;
                        assert_eq!((b[i * n + j], b[i * n + j]), (packed.at(i, j), part[at]));
                    }
                }
            }
        }
    }

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
