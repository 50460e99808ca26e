//! Criterion benches of the hot loops; each checks its result before it is timed.
//!
//!     cargo bench --bench kernels            # everything
//!     cargo bench --bench kernels -- peak    # only the products against the FMA peak

#![allow(missing_docs)]
#![allow(clippy::print_stdout)] // a table that criterion has no form for

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rsprune_core::buffer::Room;
use rsprune_core::kernels::Kernel;
use rsprune_core::linalg::{PackedB, ROW_BLOCK, Scratch, gemm};
use rsprune_core::par::{Job, Pool};
use rsprune_core::solve::Statistics;
use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

const WIDTHS: [usize; 4] = [576, 1536, 2048, 4096];

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + 13) % 1009) as f32 / 1009.0 - 0.5).collect()
}

/// The first, a middle and the last entry of `a b` for one row block.
fn check_product(kernel: &Kernel, a: &[f32], b: &[f32], out: &[f32], n: usize) {
    for (i, j) in [(0, 0), (ROW_BLOCK / 2, n / 3), (ROW_BLOCK - 1, n - 1)] {
        let terms = (0..n).map(|p| f64::from(a[i * n + p]) * f64::from(b[p * n + j]));
        let expected: f64 = terms.sum();
        assert!((f64::from(out[i * n + j]) - expected).abs() < 1e-2, "{} {i} {j}", kernel.name);
    }
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
            check_product(&kernel, &a, &b, &out, n);
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
            let mut sums = Statistics::new(n, false, Room::Memory).unwrap();
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

/// Prints, in a table of its own as criterion has no ratios, which share of the FMA peak the
/// product of a row block reaches; peak and product take turns. Threads share the packed `B`.
fn share_of_peak(_: &mut Criterion) {
    let filter = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    if filter.is_some_and(|word| word != "peak") {
        return;
    }
    let kernel = Kernel::select().expect("RSPRUNE_KERNEL names a kernel of this CPU");
    if peak_loop(kernel.name).is_none() {
        return println!("no FMA peak is known for the kernel {}", kernel.name);
    }
    println!("\nOne block of {ROW_BLOCK} rows a thread by n x n, kernel {}.", kernel.name);
    println!("Cells: min / median / max of rounds in which peak and product take turns.\n");
    println!("| n | threads | peak GFLOP/s | product GFLOP/s | % of peak |\n|---|---|---|---|---|");
    for n in WIDTHS {
        for threads in [1, 2] {
            let rounds = race(&kernel, n, threads);
            let peak = spread(rounds.iter().map(|(peak, _)| peak / 1e9));
            let product = spread(rounds.iter().map(|(_, product)| product / 1e9));
            let share = spread(rounds.iter().map(|(peak, product)| 100.0 * product / peak));
            println!("| {n} | {threads} | {peak} | {product} | {share} |");
        }
    }
}

/// (peak, product) in FLOP/s of every round.
fn race(kernel: &Kernel, n: usize, threads: usize) -> Vec<(f64, f64)> {
    // About 60 ms of work a sample and thread; `cargo test --benches` only asks whether it runs.
    let timed = std::env::args().any(|word| word == "--bench");
    let (rounds, work) = if timed { (15, 8e9) } else { (1, 1e6) };
    let (peak, flop_a_step) = peak_loop(kernel.name).expect("asked before");
    let steps = (work / flop_a_step).ceil();
    let flop_a_product = (2 * ROW_BLOCK * n * n) as f64;
    let products = (work / flop_a_product).ceil();
    let (a, b) = (noise(ROW_BLOCK * n), noise(n * n));
    let packed = PackedB::new(kernel, &b, n, n, n);
    let prepare = || {
        let (mut scratch, mut out) = (Scratch::default(), vec![0.0; ROW_BLOCK * n]);
        gemm(kernel, &mut scratch, (&a, ROW_BLOCK, n), &packed, &mut out);
        check_product(kernel, &a, &b, &out, n);
        let (a, packed) = (&a, &packed);
        move || {
            for _ in 0..products as usize {
                gemm(kernel, &mut scratch, (a, ROW_BLOCK, n), packed, &mut out);
                black_box(&out);
            }
        }
    };
    let round = |_| {
        let peak_rate = steps * flop_a_step / seconds(threads, || || peak(steps as usize));
        let product_rate = products * flop_a_product / seconds(threads, prepare);
        (threads as f64 * peak_rate, threads as f64 * product_rate)
    };
    (0..rounds).map(round).collect()
}

/// How long the slowest of `threads` takes for its call, all of them started together.
fn seconds<C: FnMut()>(threads: usize, prepare: impl Fn() -> C + Sync) -> f64 {
    let start_line = Barrier::new(threads);
    let run = || {
        let mut call = prepare();
        start_line.wait();
        let start = Instant::now();
        call();
        start.elapsed().as_secs_f64()
    };
    std::thread::scope(|scope| {
        let runners: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        runners.into_iter().map(|r| r.join().expect("no panic")).fold(0.0, f64::max)
    })
}

fn spread(values: impl Iterator<Item = f64>) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (last, middle) = (values.len() - 1, values.len() / 2);
    format!("{:.1} / {:.1} / {:.1}", values[0], values[middle], values[last])
}

/// A loop of nothing but the kernel's FMAs, as many independent sums as its tile has, and the
/// FLOP of one of its steps.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // calls of functions with target features
fn peak_loop(kernel: &str) -> Option<(fn(usize), f64)> {
    match kernel {
        // SAFETY: a kernel of this name is listed only where the CPU has its features.
        "avx512" => Some((|steps| unsafe { x86_64::avx512(steps) }, 2.0 * 28.0 * 16.0)),
        // SAFETY: as above.
        "avx2" => Some((|steps| unsafe { x86_64::avx2(steps) }, 2.0 * 12.0 * 8.0)),
        _ => None,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn peak_loop(_: &str) -> Option<(fn(usize), f64)> {
    None
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    macro_rules! peak {
        ($name:ident, $features:literal, $sums:literal, $set:ident, $fma:ident) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name(steps: usize) {
                let (x, y) = ($set(black_box(1e-3)), $set(black_box(1e-3)));
                let mut sums = [$set(black_box(0.0)); $sums];
                for _ in 0..steps {
                    for sum in &mut sums {
                        *sum = $fma(x, y, *sum);
                    }
                }
                black_box(sums);
            }
        };
    }

    peak!(avx512, "avx512f", 28, _mm512_set1_ps, _mm512_fmadd_ps);
    peak!(avx2, "avx2,fma", 12, _mm256_set1_ps, _mm256_fmadd_ps);
}

criterion_group!(benches, product, gram, share_of_peak);
criterion_main!(benches);
