//! All codes of a group: which weights it keeps, and their signs; and the best one for a group.

use crate::pack::Groups;
use std::ops::Range;

/// Codes are compared in lanes of this many.
const LANES: usize = 16;

/// The codes `{-1, 0, 1}^m` with `n` entries that are not zero.
pub(super) struct CodeTable {
    /// Columns of a group.
    pub of: usize,
    /// Codes, filled up to whole lanes.
    padded: usize,
    /// `[of, padded]`: entry `j` of all codes, then entry `j + 1`.
    entries: Vec<f32>,
    count: usize,
}

impl CodeTable {
    pub fn new(groups: Groups) -> CodeTable {
        let Groups { keep, of } = groups;
        let masks = (0..1u32 << of).filter(|mask| mask.count_ones() as usize == keep);
        let mut codes: Vec<Vec<f32>> = Vec::new();
        for mask in masks {
            for signs in 0..1u32 << keep {
                let mut kept = 0;
                codes.push(
                    (0..of)
                        .map(|j| {
                            if mask >> j & 1 == 0 {
                                return 0.0;
                            }
                            kept += 1;
                            if signs >> (kept - 1) & 1 == 0 { 1.0 } else { -1.0 }
                        })
                        .collect(),
                );
            }
        }
        let (count, padded) = (codes.len(), codes.len().next_multiple_of(LANES));
        let mut entries = vec![0.0; of * padded];
        for (c, code) in codes.iter().enumerate() {
            code.iter().enumerate().for_each(|(j, v)| entries[j * padded + c] = *v);
        }
        CodeTable { of, padded, entries, count }
    }

    /// `c G_gg c^T` of every code, for a group of the block with metric `g [w, w]`.
    pub fn energies(&self, g: &[f32], w: usize, group: Range<usize>) -> Vec<f32> {
        let energy = |c: usize| -> f32 {
            let at = |j: usize| f64::from(self.entries[j * self.padded + c]);
            let pairs = (0..self.of).flat_map(|i| (0..self.of).map(move |j| (i, j)));
            let terms = pairs.map(|(i, j)| {
                at(i) * at(j) * f64::from(g[(group.start + i) * w + group.start + j])
            });
            terms.sum::<f64>() as f32
        };
        (0..self.padded).map(|c| if c < self.count { energy(c) } else { f32::INFINITY }).collect()
    }

    /// The code with the least `alpha * energy - 2 <c, pull>`, the first of equals.
    #[inline]
    pub fn best(&self, alpha: f32, energies: &[f32], pull: &[f32]) -> usize {
        let mut least = [f32::INFINITY; LANES];
        let mut at = [0u32; LANES];
        for (chunk, energies) in energies.chunks_exact(LANES).enumerate() {
            let mut loss: [f32; LANES] = std::array::from_fn(|l| alpha * energies[l]);
            for (j, pull) in pull.iter().enumerate() {
                let entries = &self.entries[j * self.padded + chunk * LANES..][..LANES];
                let twice = 2.0 * pull;
                loss.iter_mut().zip(entries).for_each(|(loss, c)| *loss -= twice * c);
            }
            for l in 0..LANES {
                let better = loss[l] < least[l];
                least[l] = if better { loss[l] } else { least[l] };
                at[l] = if better { (chunk * LANES + l) as u32 } else { at[l] };
            }
        }
        let best =
            (0..LANES).min_by(|a, b| least[*a].total_cmp(&least[*b]).then(at[*a].cmp(&at[*b])));
        at[best.unwrap_or(0)] as usize
    }

    /// Entry `j` of code `c`.
    pub fn entry(&self, c: usize, j: usize) -> f32 {
        self.entries[j * self.padded + c]
    }
}
