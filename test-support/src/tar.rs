//! Archives made by hand.

/// Writes archives, sensible ones and others. Every member is owned by 0:0, of mode 0644 or 0755
/// and of time 0 unless it is told otherwise.
#[derive(Clone, Default)]
pub struct Tar(pub Vec<u8>);

/// A header of its own making.
#[derive(Clone)]
pub struct Head(pub [u8; 512]);

impl Head {
    /// Of a member of this type flag and size, owned by 0:0, with its usual mode and time 0.
    pub fn new(kind: u8, name: impl AsRef<[u8]>, size: u64) -> Self {
        let mut head = Self([0; 512]);
        let mode = if kind == b'5' { "0000755" } else { "0000644" };
        head.put(0, name.as_ref())
            .put(100, mode)
            .put(108, "0000000")
            .put(116, "0000000")
            .put(124, format!("{size:011o}"))
            .put(136, "00000000000")
            .put(156, [kind])
            .put(257, b"ustar\x0000")
            .put(329, "0000000")
            .put(337, "0000000");
        head
    }

    /// Overwrites the bytes at an offset of the block.
    pub fn put(&mut self, at: usize, bytes: impl AsRef<[u8]>) -> &mut Self {
        let bytes = bytes.as_ref();
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// In the format of GNU tar.
    pub fn gnu(&mut self) -> &mut Self {
        self.put(257, b"ustar  \0")
    }
}

#[expect(clippy::return_self_not_must_use, reason = "they are chained in tests")]
impl Tar {
    /// Adds a header, with its checksum computed.
    pub fn head(mut self, head: &Head) -> Self {
        let mut block = head.0;
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(block);
        self
    }

    /// Adds contents, filled up to a whole block.
    pub fn data(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend(bytes.as_ref());
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// Adds a header of a type flag and its contents.
    pub fn member(self, kind: u8, name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        let head = Head::new(kind, name, data.as_ref().len() as u64);
        self.head(&head).data(data)
    }

    /// Adds a regular file.
    pub fn file(self, name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        self.member(b'0', name, data)
    }

    /// Adds a directory.
    pub fn dir(self, name: impl AsRef<[u8]>) -> Self {
        self.member(b'5', name, "")
    }

    /// Adds a link of a type flag.
    pub fn link(self, kind: u8, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.head(Head::new(kind, name, 0).put(157, target))
    }

    /// Adds a symlink.
    pub fn symlink(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.link(b'2', name, target)
    }

    /// Adds a hard link.
    pub fn hardlink(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.link(b'1', name, target)
    }

    /// Adds PAX records for the next member.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        self.member(b'x', "PaxHeaders/x", pax_text(records))
    }

    /// Adds PAX records for all members behind them.
    pub fn global(self, records: &[(&str, &[u8])]) -> Self {
        self.member(b'g', "PaxHeaders/g", pax_text(records))
    }

    /// Adds a name (`L`) or a link target (`K`) of any length for the next member, in the way of
    /// GNU tar.
    pub fn gnu_long(self, kind: u8, name: impl AsRef<[u8]>) -> Self {
        self.member(kind, "././@LongLink", [name.as_ref(), b"\0"].concat())
    }

    /// The archive, ended by two blocks of zeros.
    pub fn end(self) -> Vec<u8> {
        self.data([0; 1024]).0
    }
}

/// PAX records as the bytes of their member.
pub fn pax_text(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut text = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        text.extend(format!("{length} {key}=").bytes());
        text.extend(*value);
        text.push(b'\n');
    }
    text
}
