//! The matrix unit of newer x86 CPUs (AMX): sums of products of int8 for 8 or 16 tokens and 16
//! output rows at a time. Sums of integers are exact, so they are those of every other instruction
//! set.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;
use std::sync::LazyLock;

use super::activations::{ActTile, BLOCK, TILE_TOKENS};
use super::lanes::{I32x16, Lanes, Line};

/// `arch_prctl`: ask that the process may use a part of the CPU state.
const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
/// The part that holds the tiles.
const XFEATURE_XTILEDATA: libc::c_ulong = 18;

/// Whether the CPU has AMX with int8 products and the system lets this process use it.
pub(super) fn available() -> bool {
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
        // Structured extended features: bit 24 is AMX-TILE, bit 25 is AMX-INT8.
        let wanted = (1 << 24) | (1 << 25);
        let has = __cpuid_count(0, 0).eax >= 7 && __cpuid_count(7, 0).edx & wanted == wanted;
        // SAFETY: the call takes two numbers and changes nothing but a permission of this process.
        has && unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            ) == 0
        }
    });
    *AVAILABLE
}

/// Work that needs a matrix unit; mark `run` as `#[inline(always)]`.
pub(super) trait TileKernel {
    fn run<V: Lanes>(self, lanes: V, tiles: &Tiles);
}

/// The shapes of the eight tiles, as the instruction that loads them wants it.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// 0 and 1 take the sums of 16 and of 8 tokens. For groups of 32 columns, 2 and 3 take the
/// activations of 16 and of 8 tokens and 4 the weights; for groups of 16, so do 5, 6 and 7.
static SHAPES: Shapes = {
    let mut shapes = Shapes {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    let wanted = [
        (16, 64),
        (8, 64),
        (16, 32),
        (8, 32),
        (8, 64),
        (16, 16),
        (8, 16),
        (4, 64),
    ];
    let mut tile = 0;
    while tile < wanted.len() {
        (shapes.rows[tile], shapes.row_bytes[tile]) = wanted[tile];
        tile += 1;
    }
    shapes
};

/// The matrix unit of the thread that it was made on, ready for use.
pub(super) struct Tiles {
    /// Not for other threads.
    thread: PhantomData<*const ()>,
}

impl Tiles {
    /// # Safety
    /// AMX is [`available`], and the thread has no other `Tiles`.
    pub(super) unsafe fn new() -> Self {
        // SAFETY: the CPU has the instruction; the shapes are within its limits of 16 rows of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, readonly)) };
        Self {
            thread: PhantomData,
        }
    }

    /// `sums[t]` is, for each of sixteen output rows, `Σ_c q[c] · x[t][c]` over the columns `c` of the
    /// `part`-th group of a block, for the first `T` tokens.
    ///
    /// `q` are the weights as signed bytes, four columns to a line; `T` is 8 or 16, and `GROUP` 16 or 32.
    #[inline(always)]
    pub(super) fn dots<const T: usize, const GROUP: usize>(
        &self,
        x: &ActTile,
        part: usize,
        q: &[Line],
        sums: &mut [I32x16; TILE_TOKENS],
    ) {
        assert!(part < BLOCK / GROUP && q.len() == GROUP / 4);
        let words = &raw const x.words[0][part * (GROUP / 4)];
        macro_rules! dots {
            ($sums:literal, $x:literal, $q:literal) => {
                // SAFETY: the tiles are configured (see `new`). They read `GROUP` bytes of
                // `T` rows and `GROUP / 4` lines, and write `T` lines: all within what the assertion
                // and the types say.
                unsafe {
                    asm!(
                        concat!("tilezero tmm", $sums),
                        concat!("tileloadd tmm", $x, ", [{words} + {stride}]"),
                        concat!("tileloadd tmm", $q, ", [{q} + {line}]"),
                        concat!("tdpbssd tmm", $sums, ", tmm", $x, ", tmm", $q),
                        concat!("tilestored [{sums} + {line}], tmm", $sums),
                        words = in(reg) words,
                        stride = in(reg) BLOCK,
                        q = in(reg) q.as_ptr(),
                        line = in(reg) size_of::<Line>(),
                        sums = in(reg) sums.as_mut_ptr(),
                        options(nostack, preserves_flags),
                    )
                }
            };
        }
        match (T, GROUP) {
            (16, 32) => dots!("0", "2", "4"),
            (8, 32) => dots!("1", "3", "4"),
            (16, 16) => dots!("0", "5", "7"),
            (8, 16) => dots!("1", "6", "7"),
            _ => unreachable!("no tiles for {T} tokens and groups of {GROUP}"),
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the CPU has the instruction. Without it, each switch of threads would save 8 KiB.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}
