use std::fmt;

/// The element type of a tensor in a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GgmlType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a float32.
    BF16,
    /// 4 bits, a scale per 32.
    Q4_0,
    /// 4 bits, a scale and a minimum per 32.
    Q4_1,
    /// 5 bits, a scale per 32.
    Q5_0,
    /// 5 bits, a scale and a minimum per 32.
    Q5_1,
    /// 8 bits, a scale per 32.
    Q8_0,
    /// 2 bits; blocks of 256 with a 4-bit scale and minimum per 16.
    Q2K,
    /// 3 bits; blocks of 256 with a 6-bit scale per 16.
    Q3K,
    /// 4 bits; blocks of 256 with a 6-bit scale and minimum per 32.
    Q4K,
    /// 5 bits; blocks of 256 with a 6-bit scale and minimum per 32.
    Q5K,
    /// 6 bits; blocks of 256 with an 8-bit scale per 16.
    Q6K,
    /// 4 bits that choose from a table of 16 values, a scale per 32.
    Iq4Nl,
    /// The same; blocks of 256 with a 6-bit scale per 32.
    Iq4Xs,
}

/// How a quantised type spends its bits; see [`Unpacked`](super::Unpacked) for the formula.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// Every integer is below `1 << bits`.
    pub bits: u32,
    /// Weights that share a scale: 16 or 32.
    pub group: usize,
    /// The integer that stands for `min`; 0 where there is a minimum.
    pub offset: u8,
    /// Whether groups have a minimum of their own.
    pub has_min: bool,
}

/// Why bytes cannot be read as weights of a type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantError {
    /// GGML defines the type, Spate does not read it.
    #[error(
        "tensor type {name} is not supported; use a file quantised as one of {}",
        GgmlType::names()
    )]
    Unsupported {
        /// Its name in GGML.
        name: &'static str,
    },
    /// No such type.
    #[error("unknown tensor type {id}; supported are {}", GgmlType::names())]
    Unknown {
        /// The number in the file.
        id: u32,
    },
    /// Rows are made of whole blocks.
    #[error("a row of {cols} weights is not a whole number of {ty} blocks of {}", ty.block_elems())]
    PartialBlock {
        /// Type of the tensor.
        ty: GgmlType,
        /// Weights in the row.
        cols: usize,
    },
    /// The size does not fit the address space.
    #[error("a row of {cols} weights of type {ty} is too large for this machine")]
    TooLarge {
        /// Type of the tensor.
        ty: GgmlType,
        /// Weights in the row.
        cols: usize,
    },
    /// A matrix without elements.
    #[error("a tensor of type {ty} has no elements")]
    Empty {
        /// Type of the tensor.
        ty: GgmlType,
    },
    /// Size and shape disagree.
    #[error("{weights} weights of type {ty} take {expected} bytes, but there are {got}")]
    Length {
        /// Type of the tensor.
        ty: GgmlType,
        /// Weights asked for.
        weights: usize,
        /// Bytes they take.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
}

impl GgmlType {
    /// Every type, in the order of GGML's numbers.
    pub const ALL: [GgmlType; 15] = [
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2K,
        GgmlType::Q3K,
        GgmlType::Q4K,
        GgmlType::Q5K,
        GgmlType::Q6K,
        GgmlType::Iq4Nl,
        GgmlType::Iq4Xs,
        GgmlType::BF16,
    ];

    /// The type that a GGUF file names by this number.
    ///
    /// # Errors
    /// [`QuantError::Unsupported`] with its name for a type that GGML defines and Spate does not
    /// read, [`QuantError::Unknown`] for any other number.
    pub fn from_u32(id: u32) -> Result<Self, QuantError> {
        let name = match id {
            0 => return Ok(GgmlType::F32),
            1 => return Ok(GgmlType::F16),
            2 => return Ok(GgmlType::Q4_0),
            3 => return Ok(GgmlType::Q4_1),
            6 => return Ok(GgmlType::Q5_0),
            7 => return Ok(GgmlType::Q5_1),
            8 => return Ok(GgmlType::Q8_0),
            10 => return Ok(GgmlType::Q2K),
            11 => return Ok(GgmlType::Q3K),
            12 => return Ok(GgmlType::Q4K),
            13 => return Ok(GgmlType::Q5K),
            14 => return Ok(GgmlType::Q6K),
            20 => return Ok(GgmlType::Iq4Nl),
            23 => return Ok(GgmlType::Iq4Xs),
            30 => return Ok(GgmlType::BF16),
            4 => "Q4_2",
            5 => "Q4_3",
            9 => "Q8_1",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            21 => "IQ3_S",
            22 => "IQ2_S",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            31 => "Q4_0_4_4",
            32 => "Q4_0_4_8",
            33 => "Q4_0_8_8",
            34 => "TQ1_0",
            35 => "TQ2_0",
            36 => "IQ4_NL_4_4",
            37 => "IQ4_NL_4_8",
            38 => "IQ4_NL_8_8",
            39 => "MXFP4",
            _ => return Err(QuantError::Unknown { id }),
        };
        Err(QuantError::Unsupported { name })
    }

    /// Its name in GGML.
    pub fn name(self) -> &'static str {
        match self {
            GgmlType::F32 => "F32",
            GgmlType::F16 => "F16",
            GgmlType::BF16 => "BF16",
            GgmlType::Q4_0 => "Q4_0",
            GgmlType::Q4_1 => "Q4_1",
            GgmlType::Q5_0 => "Q5_0",
            GgmlType::Q5_1 => "Q5_1",
            GgmlType::Q8_0 => "Q8_0",
            GgmlType::Q2K => "Q2_K",
            GgmlType::Q3K => "Q3_K",
            GgmlType::Q4K => "Q4_K",
            GgmlType::Q5K => "Q5_K",
            GgmlType::Q6K => "Q6_K",
            GgmlType::Iq4Nl => "IQ4_NL",
            GgmlType::Iq4Xs => "IQ4_XS",
        }
    }

    /// Weights in a block; 1 for the float types.
    pub fn block_elems(self) -> usize {
        match self {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => 1,
            GgmlType::Q4_0
            | GgmlType::Q4_1
            | GgmlType::Q5_0
            | GgmlType::Q5_1
            | GgmlType::Q8_0
            | GgmlType::Iq4Nl => 32,
            GgmlType::Q2K
            | GgmlType::Q3K
            | GgmlType::Q4K
            | GgmlType::Q5K
            | GgmlType::Q6K
            | GgmlType::Iq4Xs => 256,
        }
    }

    /// Bytes in a block.
    pub fn block_bytes(self) -> usize {
        match self {
            GgmlType::F32 => 4,
            GgmlType::F16 | GgmlType::BF16 => 2,
            GgmlType::Q4_0 => 2 + 16,
            GgmlType::Q4_1 => 2 + 2 + 16,
            GgmlType::Q5_0 => 2 + 4 + 16,
            GgmlType::Q5_1 => 2 + 2 + 4 + 16,
            GgmlType::Q8_0 => 2 + 32,
            GgmlType::Q2K => 16 + 64 + 2 + 2,
            GgmlType::Q3K => 32 + 64 + 12 + 2,
            GgmlType::Q4K => 2 + 2 + 12 + 128,
            GgmlType::Q5K => 2 + 2 + 12 + 32 + 128,
            GgmlType::Q6K => 128 + 64 + 16 + 2,
            GgmlType::Iq4Nl => 2 + 16,
            GgmlType::Iq4Xs => 2 + 2 + 4 + 128,
        }
    }

    /// Bytes that `cols` consecutive weights take.
    ///
    /// # Errors
    /// When `cols` is not a multiple of [`block_elems`](Self::block_elems), or the size overflows.
    pub fn row_bytes(self, cols: usize) -> Result<usize, QuantError> {
        if !cols.is_multiple_of(self.block_elems()) {
            return Err(QuantError::PartialBlock { ty: self, cols });
        }
        (cols / self.block_elems())
            .checked_mul(self.block_bytes())
            .ok_or(QuantError::TooLarge { ty: self, cols })
    }

    /// The layout of a quantised type; `None` for the float types.
    pub fn scheme(self) -> Option<Scheme> {
        let (bits, group, offset) = match self {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => return None,
            GgmlType::Q4_0 => (4, 32, 8),
            GgmlType::Q4_1 | GgmlType::Q4K => (4, 32, 0),
            GgmlType::Q5_0 => (5, 32, 16),
            GgmlType::Q5_1 | GgmlType::Q5K => (5, 32, 0),
            // The table's values are 8-bit integers.
            GgmlType::Q8_0 | GgmlType::Iq4Nl | GgmlType::Iq4Xs => (8, 32, 128),
            GgmlType::Q2K => (2, 16, 0),
            GgmlType::Q3K => (3, 16, 4),
            GgmlType::Q6K => (6, 16, 32),
        };
        Some(Scheme {
            bits,
            group,
            offset,
            has_min: offset == 0,
        })
    }

    fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
