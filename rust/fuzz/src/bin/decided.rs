//! The parts of weights that only their solver can pack: refused, or a weight of its shape.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../packed_case.rs"]
mod packed_case;

fuzz_target!(|file: &[u8]| {
    let known: [&[u8]; 4] = [b"binary ", b"residual ", b"row-column", b"uniform "];
    if !known.iter().any(|name| file.starts_with(name)) {
        return;
    }
    let Ok((weight, dense, _)) = packed_case::unpack_file(file) else { return };
    assert_eq!(weight.len(), dense.nbytes());
});
