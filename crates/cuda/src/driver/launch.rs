use std::ffi::c_void;

use cudarc::driver::sys;

use super::{Kernel, Plain, Slice, Stream};
use crate::CudaError;
use crate::error::Check;

/// Most parameters of a kernel.
const MAX_PARAMETERS: usize = 24;

/// How a kernel is spread over the GPU.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    grid: [u32; 3],
    block: u32,
    shared: u32,
    cluster: u32,
    dependent: bool,
}

impl Shape {
    /// `grid` blocks of `block` threads.
    ///
    /// The kernel may start while the one before it in the stream is still finishing, where the
    /// device can do that: all of ours wait for it by themselves before they touch what it wrote.
    pub fn new(grid: u32, block: u32) -> Self {
        Self {
            grid: [grid, 1, 1],
            block,
            shared: 0,
            cluster: 1,
            dependent: true,
        }
    }

    /// A second and third dimension of the grid.
    #[must_use]
    pub fn grid_yz(mut self, y: u32, z: u32) -> Self {
        (self.grid[1], self.grid[2]) = (y, z);
        self
    }

    /// Dynamic shared memory per block; above 48 KiB see [`Kernel::allow_shared_bytes`].
    #[must_use]
    pub fn shared_bytes(mut self, bytes: u32) -> Self {
        self.shared = bytes;
        self
    }

    /// Blocks of a cluster, neighbours in x; needs compute capability 9.0.
    #[must_use]
    pub fn cluster(mut self, blocks: u32) -> Self {
        self.cluster = blocks;
        self
    }

    /// Starts only when the kernel before has ended.
    #[must_use]
    pub fn after_previous(mut self) -> Self {
        self.dependent = false;
        self
    }
}

/// What can be passed to a kernel.
///
/// # Safety
/// [`Parameter::address`] points to a value of the size and layout that the kernel declares, and
/// that stays where it is as long as `self` is borrowed.
pub unsafe trait Parameter {
    /// Where the value is.
    fn address(&self) -> *mut c_void;
}

// SAFETY: plain values are passed as they are.
unsafe impl<T: Plain> Parameter for T {
    fn address(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

// SAFETY: kernels take pointers; the length stays here.
unsafe impl<T> Parameter for Slice<T> {
    fn address(&self) -> *mut c_void {
        std::ptr::from_ref(self.address_ref()).cast_mut().cast()
    }
}

/// A tuple of [`Parameter`]s, in the order in which the kernel declares them.
pub trait Arguments {
    /// Fills in where the values are; returns how many there are.
    fn addresses(&self, out: &mut [*mut c_void; MAX_PARAMETERS]) -> usize;
}

macro_rules! arguments {
    ($($name:ident)+) => {
        impl<$($name: Parameter),+> Arguments for ($($name,)+) {
            fn addresses(&self, out: &mut [*mut c_void; MAX_PARAMETERS]) -> usize {
                #[allow(non_snake_case)]
                let ($($name,)+) = self;
                let addresses = [$($name.address()),+];
                out[..addresses.len()].copy_from_slice(&addresses);
                addresses.len()
            }
        }
    };
}

macro_rules! arguments_up_to {
    ($first:ident) => { arguments!($first); };
    ($first:ident $($rest:ident)+) => {
        arguments!($first $($rest)+);
        arguments_up_to!($($rest)+);
    };
}

arguments_up_to!(A B C D E F G H I J K L M N O P Q R S T U V W X);

impl Kernel {
    /// Queues the kernel.
    ///
    /// # Errors
    /// When the shape is not possible, or something that ran before has failed.
    ///
    /// # Safety
    /// The arguments have the types that the kernel declares, in its order, and the memory that the
    /// kernel touches under them is allocated and unused by others until it has run.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        shape: Shape,
        arguments: &impl Arguments,
    ) -> Result<(), CudaError> {
        let mut addresses = [std::ptr::null_mut(); MAX_PARAMETERS];
        arguments.addresses(&mut addresses);
        // SAFETY: all zeros is a value of this C struct.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        if shape.dependent && self.device().has_dependent_launch() {
            attributes[count].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count]
                .value
                .programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        if shape.cluster > 1 {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: shape.cluster,
                y: 1,
                z: 1,
            };
            count += 1;
        }
        let [x, y, z] = shape.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: shape.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        // SAFETY: the driver reads the config and the arguments, all alive here, before it returns;
        // the caller vouches for the arguments.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.function,
                addresses.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .check(self.file())
    }
}
