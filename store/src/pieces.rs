//! Files that are too large to be held in memory as a whole, handed on in pieces.

/// About the length of a piece, in bytes.
const PIECE: usize = 1 << 20;

/// Takes a piece and its offset.
pub(crate) type Put<'a, E> = dyn FnMut(&[u8], u64) -> Result<(), E> + 'a;

/// Gathers bytes into pieces, and hashes them.
pub(crate) struct Pieces<'a, E> {
    put: &'a mut Put<'a, E>,
    piece: Vec<u8>,
    at: u64,
    hasher: blake3::Hasher,
}

impl<'a, E> Pieces<'a, E> {
    /// Begins at an offset of the file.
    pub(crate) fn new(at: u64, put: &'a mut Put<'a, E>) -> Self {
        Self {
            put,
            piece: Vec::new(),
            at,
            hasher: blake3::Hasher::new(),
        }
    }

    /// Appends what `write` appends, which should be far less than a piece.
    pub(crate) fn add(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> Result<(), E> {
        write(&mut self.piece);
        if self.piece.len() >= PIECE {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), E> {
        self.hasher.update(&self.piece);
        (self.put)(&self.piece, self.at)?;
        self.at += self.piece.len() as u64;
        self.piece.clear();
        Ok(())
    }

    /// Hands on the last piece. Returns the hash of all, and what takes pieces, for one that is
    /// known only now.
    pub(crate) fn finish(mut self) -> Result<(blake3::Hash, &'a mut Put<'a, E>), E> {
        self.flush()?;
        Ok((self.hasher.finalize(), self.put))
    }
}

/// Puts pieces together in memory.
pub(crate) fn collect<E>(bytes: &mut Vec<u8>) -> impl FnMut(&[u8], u64) -> Result<(), E> {
    |piece, at| {
        let at = at as usize;
        bytes.resize(bytes.len().max(at + piece.len()), 0);
        bytes[at..at + piece.len()].copy_from_slice(piece);
        Ok(())
    }
}
