//! Our product beside those of crates, taking turns on one thread: what our own kernel has to earn.
//!
//!     cargo bench --bench crates

#![allow(missing_docs)]
#![allow(clippy::print_stdout)] // the table is what this makes

use gemmkit::{MatMut, MatRef, Parallelism, gemm_packed_b, prepack_rhs};
use rsprune_core::kernels::Kernel;
use rsprune_core::linalg::{PackedB, ROW_BLOCK, Scratch, gemm};
use std::hint::black_box;
use std::time::Instant;

const WIDTHS: [usize; 4] = [576, 1536, 2048, 4096];
const NAMES: [&str; 3] = ["ours", "gemmkit, packed", "matrixmultiply"];

fn main() {
    // `cargo test --benches` only asks whether it runs.
    let timed = std::env::args().any(|word| word == "--bench");
    let (rounds, work) = if timed { (15, 8e9) } else { (1, 1e6) };
    let kernel = Kernel::select().expect("RSPRUNE_KERNEL names a kernel of this CPU");
    println!(
        "\nBlocks of {ROW_BLOCK} rows by n x n, kernel {}. GFLOP/s: min / median / max.",
        kernel.name
    );
    println!("\n| n | {} |\n|---|---|---|---|", NAMES.join(" | "));
    for n in WIDTHS {
        let products = (work / (2 * ROW_BLOCK * n * n) as f64).ceil() as usize;
        let rates = race(&kernel, n, rounds, products);
        let cells = rates.map(spread);
        println!("| {n} | {} |", cells.join(" | "));
    }
}

/// GFLOP/s of every round, contestant by contestant.
fn race(kernel: &Kernel, n: usize, rounds: usize, products: usize) -> [Vec<f64>; 3] {
    let (a, b) = (noise(ROW_BLOCK * n), noise(n * n));
    let mut scratch = Scratch::default();
    let ours = PackedB::new(kernel, &b, n, n, n);
    let theirs = prepack_rhs(MatRef::from_row_major(&b, n, n));
    let mut product = |contestant: usize, out: &mut [f32]| match contestant {
        0 => gemm(kernel, &mut scratch, (&a, ROW_BLOCK, n), &ours, out),
        1 => {
            // It takes a packed B only where C lies column by column.
            let a = MatRef::from_row_major(&a, ROW_BLOCK, n);
            let c = MatMut::from_col_major(out, ROW_BLOCK, n);
            gemm_packed_b(1.0, a, &theirs, 0.0, c, Parallelism::Serial);
        }
        _ => by_matrixmultiply(&a, &b, n, out),
    };
    let mut out = vec![0.0; ROW_BLOCK * n];
    let results = [0, 1, 2].map(|contestant| {
        product(contestant, &mut out);
        out.clone()
    });
    for (at, x) in results[0].iter().enumerate() {
        let (i, j) = (at / n, at % n);
        for y in [results[1][j * ROW_BLOCK + i], results[2][at]] {
            assert!((x - y).abs() < 1e-3 * (n as f32).sqrt(), "n = {n}: {x} {y}");
        }
    }
    let mut rates = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        for (contestant, rates) in rates.iter_mut().enumerate() {
            let start = Instant::now();
            for _ in 0..products {
                product(contestant, &mut out);
                black_box(&out);
            }
            let flop = (2 * products * ROW_BLOCK * n * n) as f64;
            rates.push(flop / start.elapsed().as_secs_f64() / 1e9);
        }
    }
    rates
}

#[allow(unsafe_code)] // the crate has no safe door
fn by_matrixmultiply(a: &[f32], b: &[f32], n: usize, out: &mut [f32]) {
    assert!(a.len() == ROW_BLOCK * n && b.len() == n * n && out.len() == ROW_BLOCK * n);
    let (rows, stride) = (ROW_BLOCK, n as isize);
    // SAFETY: the lengths are those of row-major matrices of these shapes.
    unsafe {
        matrixmultiply::sgemm(
            rows,
            n,
            n,
            1.0,
            a.as_ptr(),
            stride,
            1,
            b.as_ptr(),
            stride,
            1,
            0.0,
            out.as_mut_ptr(),
            stride,
            1,
        );
    }
}

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + 13) % 1009) as f32 / 1009.0 - 0.5).collect()
}

fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let (last, middle) = (values.len() - 1, values.len() / 2);
    format!("{:.1} / {:.1} / {:.1}", values[0], values[middle], values[last])
}
