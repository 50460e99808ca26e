//! The assignment problem: `max sum_i gain[i, column(i)]` over permutations.
//!
//! The Hungarian method by shortest augmenting paths: rows are added one by one, each along the
//! cheapest alternating path in reduced costs. `O(n^3)`.

/// For every row of `gain [n, n]` the column that it is assigned to; the total is the largest.
pub fn assign(gain: &[f64], n: usize) -> Vec<usize> {
    assert_eq!(gain.len(), n * n, "the gains are a square");
    // One based, with column 0 as the root of every path.
    let mut potential = (vec![0.0f64; n + 1], vec![0.0f64; n + 1]);
    let mut row_of = vec![0usize; n + 1];
    for row in 1..=n {
        row_of[0] = row;
        augment(gain, n, &mut potential, &mut row_of);
    }
    let mut column_of = vec![0; n];
    (1..=n).for_each(|column| column_of[row_of[column] - 1] = column - 1);
    column_of
}

/// Finds the cheapest path from the row at column 0 to a free column, and flips it.
fn augment(
    gain: &[f64],
    n: usize,
    (rows, columns): &mut (Vec<f64>, Vec<f64>),
    row_of: &mut [usize],
) {
    let mut least = vec![f64::INFINITY; n + 1];
    let mut previous = vec![0usize; n + 1];
    let mut visited = vec![false; n + 1];
    let mut at = 0;
    while row_of[at] != 0 {
        visited[at] = true;
        let row = row_of[at];
        let (mut delta, mut next) = (f64::INFINITY, 0);
        for column in (1..=n).filter(|c| !visited[*c]) {
            let cost = -gain[(row - 1) * n + column - 1] - rows[row] - columns[column];
            if cost < least[column] {
                (least[column], previous[column]) = (cost, at);
            }
            if least[column] < delta {
                (delta, next) = (least[column], column);
            }
        }
        for column in 0..=n {
            if visited[column] {
                rows[row_of[column]] += delta;
                columns[column] -= delta;
            } else {
                least[column] -= delta;
            }
        }
        at = next;
    }
    while at != 0 {
        row_of[at] = row_of[previous[at]];
        at = previous[at];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn best_by_enumeration(gain: &[f64], n: usize, row: usize, used: &mut Vec<bool>) -> f64 {
        if row == n {
            return 0.0;
        }
        let mut best = f64::NEG_INFINITY;
        for column in 0..n {
            if !used[column] {
                used[column] = true;
                let rest = best_by_enumeration(gain, n, row + 1, used);
                best = best.max(gain[row * n + column] + rest);
                used[column] = false;
            }
        }
        best
    }

    proptest! {
        #[test]
        fn no_permutation_gains_more(n in 1usize..7, values in prop::collection::vec(-9i32..9, 36)) {
            let gain: Vec<f64> = values[..n * n].iter().map(|v| f64::from(*v)).collect();
            let columns = assign(&gain, n);
            let mut sorted = columns.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..n).collect::<Vec<_>>());
            let found: f64 = columns.iter().enumerate().map(|(r, c)| gain[r * n + c]).sum();
            prop_assert_eq!(found, best_by_enumeration(&gain, n, 0, &mut vec![false; n]));
        }
    }
}
