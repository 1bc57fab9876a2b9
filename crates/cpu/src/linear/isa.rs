#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx::{self, TileKernel, Tiles};
use super::lanes::{Kernel, Lanes, Scalar};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};

/// An instruction set that this CPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx,
}

impl Isa {
    /// All that this CPU has, the fastest last. The first is always plain Rust.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)] // other architectures have one entry
        let mut available = vec![Self(Kind::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                available.push(Self(Kind::Avx2));
            }
            if avx2 && is_x86_feature_detected!("avxvnni") {
                available.push(Self(Kind::AvxVnni));
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                available.push(Self(Kind::Avx512));
                #[cfg(target_os = "linux")]
                if amx::available() {
                    available.push(Self(Kind::Amx));
                }
            }
        }
        available
    }

    /// The fastest that this CPU has.
    pub fn best() -> Self {
        *Self::available()
            .last()
            .expect("plain Rust is always available")
    }

    /// For people: logs and the start banner.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Kind::AvxVnni => "AVX2 + VNNI",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "AVX-512 + VNNI",
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Kind::Amx => "AVX-512 + VNNI + AMX",
        }
    }

    /// Runs `kernel`, compiled for this instruction set.
    pub(crate) fn run(self, kernel: impl Kernel) {
        match self.0 {
            Kind::Scalar => kernel.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an Isa of this kind exists only where `available` found AVX2, FMA and F16C.
            Kind::Avx2 => unsafe { run_avx2(kernel, Avx2::<false>::new()) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above, and AVX-VNNI.
            Kind::AvxVnni => unsafe { run_avx_vnni(kernel, Avx2::<true>::new()) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above, and AVX-512 F, BW, VL and VNNI.
            Kind::Avx512 => unsafe { run_avx512(kernel, Avx512::new()) },
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            // SAFETY: AMX is found only together with those.
            Kind::Amx => unsafe { run_avx512(kernel, Avx512::new()) },
        }
    }

    /// Whether there is a matrix unit.
    pub(super) fn has_tiles(self) -> bool {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        return self.0 == Kind::Amx;
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        false
    }

    /// Runs `kernel` with this thread's matrix unit.
    ///
    /// # Panics
    /// If this instruction set [has none](Self::has_tiles).
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn run_tiles(self, kernel: impl TileKernel) {
        assert!(self.has_tiles());
        // SAFETY: an Isa of this kind exists only where `available` found AMX and AVX-512; kernels do
        // not run kernels, so the thread has no other `Tiles`.
        unsafe { run_amx(kernel, Avx512::new(), &Tiles::new()) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2(kernel: impl Kernel, lanes: impl Lanes) {
    kernel.run(lanes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn run_avx_vnni(kernel: impl Kernel, lanes: impl Lanes) {
    kernel.run(lanes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn run_avx512(kernel: impl Kernel, lanes: impl Lanes) {
    kernel.run(lanes);
}

/// AMX itself is written in assembly language, which needs no feature.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn run_amx(kernel: impl TileKernel, lanes: impl Lanes, tiles: &Tiles) {
    kernel.run(lanes, tiles);
}
