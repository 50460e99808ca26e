//! Criterion benches of the hot loops; each checks its result before it is timed.
//!
//!     cargo bench --bench kernels

#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rsprune_core::kernels::Kernel;
use rsprune_core::linalg::{PackedB, ROW_BLOCK, Scratch, gemm};
use rsprune_core::par::{Job, Pool};
use rsprune_core::solve::Statistics;
use std::hint::black_box;
use std::sync::atomic::AtomicBool;

const WIDTHS: [usize; 4] = [576, 1536, 2048, 4096];

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + 13) % 1009) as f32 / 1009.0 - 0.5).collect()
}

/// One row block of a FISTA step's product, one thread, every kernel of this CPU.
fn product(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemm");
    for n in WIDTHS {
        let (a, b) = (noise(ROW_BLOCK * n), noise(n * n));
        let mut out = vec![0.0; ROW_BLOCK * n];
        group.throughput(Throughput::Elements((2 * ROW_BLOCK * n * n) as u64));
        for kernel in Kernel::available() {
            let packed = PackedB::new(&kernel, &b, n, n, n);
            let mut scratch = Scratch::default();
            gemm(&kernel, &mut scratch, (&a, ROW_BLOCK, n), &packed, &mut out);
            let expected: f64 = (0..n).map(|p| f64::from(a[p]) * f64::from(b[p * n])).sum();
            assert!((f64::from(out[0]) - expected).abs() < 1e-2, "{}", kernel.name);
            group.bench_function(BenchmarkId::new(kernel.name, n), |bench| {
                bench.iter(|| {
                    gemm(&kernel, &mut scratch, (&a, ROW_BLOCK, n), &packed, &mut out);
                    black_box(&out);
                });
            });
        }
    }
    group.finish();
}

/// A window of 512 tokens added to a Gram sum, on one and two threads.
fn gram(c: &mut Criterion) {
    const TOKENS: usize = 512;
    let mut group = c.benchmark_group("gram");
    group.sample_size(10);
    let kernel = Kernel::select().expect("the scalar kernel is always there");
    let flag = AtomicBool::new(false);
    for n in WIDTHS {
        let x = noise(TOKENS * n);
        group.throughput(Throughput::Elements((TOKENS * n * n) as u64));
        for threads in [1, 2] {
            let pool = Pool::new(threads).expect("two threads");
            let mut sums = Statistics::new(n, false);
            sums.add(&Job::new(&pool, &flag), &kernel, &x, None).expect("finite input");
            let expected: f64 = x.chunks(n).map(|row| f64::from(row[0]).powi(2)).sum();
            assert!((sums.diagonal()[0] - expected).abs() < 1e-2);
            group.bench_function(BenchmarkId::new(format!("{threads} threads"), n), |bench| {
                bench.iter(|| sums.add(&Job::new(&pool, &flag), &kernel, &x, None));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, product, gram);
criterion_main!(benches);
