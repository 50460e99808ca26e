//! The parts of a `bitmap` weight: refused, or a weight that packs to parts which unpack to it again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rsprune_core::pack::{pack, unpack};

#[path = "../packed_case.rs"]
mod packed_case;

fuzz_target!(|file: &[u8]| {
    if !file.starts_with(b"bitmap ") {
        return;
    }
    let Ok((weight, dense, format)) = packed_case::unpack_file(file) else { return };
    assert_eq!(weight.len(), dense.nbytes());
    // A stored zero of a bitmap is not stored again, so its format has another count then.
    let Ok(parts) = pack(&weight, &dense, &format) else {
        return assert!("bitmap" == "bitmap");
    };
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    assert_eq!(unpack(&parts, &dense, &format, 0..dense.rows).unwrap(), weight);
});
