//! Reads the binary format of `COPY … TO STDOUT`.

use crate::error::Error;

const SIGNATURE: &[u8; 11] = b"PGCOPY\n\xff\r\n\0";

/// Takes the pieces of a stream, whatever their borders, and gives the rows.
#[derive(Default)]
pub(crate) struct Rows {
    /// What is left of a row that goes on in the next piece.
    rest: Vec<u8>,
    place: Place,
}

#[derive(Default, PartialEq, Eq, Clone, Copy)]
enum Place {
    #[default]
    Header,
    Rows,
    End,
}

/// One value of a row; `None` is null.
#[derive(Clone, Copy, Default)]
pub(crate) struct Field<'a>(Option<&'a [u8]>);

impl Rows {
    /// Calls `each` with every row that is complete.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if this is not such a stream of rows of `N` values, or what `each` gives.
    pub(crate) fn feed<const N: usize>(
        &mut self,
        piece: &[u8],
        mut each: impl FnMut([Field<'_>; N]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.rest.is_empty() {
            let left = read(&mut self.place, piece, &mut each)?;
            self.rest.extend_from_slice(left);
            return Ok(());
        }
        let mut all = std::mem::take(&mut self.rest);
        all.extend_from_slice(piece);
        let left = read(&mut self.place, &all, &mut each)?.len();
        all.drain(..all.len() - left);
        self.rest = all;
        Ok(())
    }

    /// # Errors
    /// [`Error::Unreadable`] if the stream was cut short.
    pub(crate) fn end(&self) -> Result<(), Error> {
        if self.place == Place::End && self.rest.is_empty() { Ok(()) } else { Err(unreadable()) }
    }
}

/// Gives what is left.
fn read<'a, const N: usize>(
    place: &mut Place,
    mut bytes: &'a [u8],
    each: &mut impl FnMut([Field<'_>; N]) -> Result<(), Error>,
) -> Result<&'a [u8], Error> {
    loop {
        let mut ahead = bytes;
        match place {
            Place::Header => {
                let Some((signature, extension)) = header(&mut ahead) else { return Ok(bytes) };
                if signature != SIGNATURE {
                    return Err(unreadable());
                }
                if take(&mut ahead, extension).is_none() {
                    return Ok(bytes);
                }
                *place = Place::Rows;
            }
            Place::Rows => {
                let Some(count) = number(&mut ahead).map(i16::from_be_bytes) else { return Ok(bytes) };
                if count == -1 {
                    *place = Place::End;
                } else {
                    if usize::try_from(count) != Ok(N) {
                        return Err(unreadable());
                    }
                    let mut row = [Field::default(); N];
                    for field in &mut row {
                        let Some(length) = number(&mut ahead).map(i32::from_be_bytes) else {
                            return Ok(bytes);
                        };
                        if let Ok(length) = usize::try_from(length) {
                            let Some(value) = take(&mut ahead, length) else { return Ok(bytes) };
                            *field = Field(Some(value));
                        }
                    }
                    each(row)?;
                }
            }
            Place::End => return if bytes.is_empty() { Ok(bytes) } else { Err(unreadable()) },
        }
        bytes = ahead;
    }
}

/// The signature and how long the extension is.
fn header<'a>(bytes: &mut &'a [u8]) -> Option<(&'a [u8], usize)> {
    let signature = take(bytes, SIGNATURE.len())?;
    let _flags: [u8; 4] = number(bytes)?;
    let extension = u32::from_be_bytes(number(bytes)?);
    Some((signature, extension as usize))
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, left) = bytes.split_at_checked(length)?;
    *bytes = left;
    Some(taken)
}

fn number<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (number, left) = bytes.split_first_chunk::<N>()?;
    *bytes = left;
    Some(*number)
}

fn unreadable() -> Error {
    Error::Unreadable { what: "a copy stream".to_owned() }
}

impl<'a> Field<'a> {
    pub(crate) fn int8(self) -> Result<i64, Error> {
        self.0.and_then(|value| value.try_into().ok()).map(i64::from_be_bytes).ok_or_else(unreadable)
    }

    /// As it came; `None` is null.
    pub(crate) fn bytes(self) -> Option<&'a [u8]> {
        self.0
    }

    pub(crate) fn bool_or_null(self) -> Result<Option<bool>, Error> {
        match self.0 {
            None => Ok(None),
            Some([0]) => Ok(Some(false)),
            Some([1]) => Ok(Some(true)),
            Some(_) => Err(unreadable()),
        }
    }

    pub(crate) fn int4_or_null(self) -> Result<Option<i32>, Error> {
        let Some(value) = self.0 else { return Ok(None) };
        value.try_into().map(|value| Some(i32::from_be_bytes(value))).map_err(|_| unreadable())
    }

    /// A moment, in microseconds since 1970.
    pub(crate) fn micros_or_null(self) -> Result<Option<i64>, Error> {
        if self.0.is_none() {
            return Ok(None);
        }
        // Postgres counts from 2000.
        self.int8()?.checked_add(946_684_800_000_000).map(Some).ok_or_else(unreadable)
    }

    pub(crate) fn text(self) -> Result<&'a str, Error> {
        self.text_or_null()?.ok_or_else(unreadable)
    }

    pub(crate) fn text_or_null(self) -> Result<Option<&'a str>, Error> {
        self.0.map(std::str::from_utf8).transpose().map_err(|_| unreadable())
    }

    /// An array of one dimension without nulls; null stands for an empty one.
    pub(crate) fn int8s(self) -> Result<impl Iterator<Item = i64> + 'a, Error> {
        let elements = match self.0 {
            None => &[],
            Some(mut array) => {
                let dimensions = number(&mut array).map(i32::from_be_bytes).ok_or_else(unreadable)?;
                let _has_nulls_and_type: [u8; 8] = number(&mut array).ok_or_else(unreadable)?;
                let mut length = 0;
                if dimensions == 1 {
                    length = number(&mut array).map(u32::from_be_bytes).ok_or_else(unreadable)? as usize;
                    let _lower_bound: [u8; 4] = number(&mut array).ok_or_else(unreadable)?;
                }
                let (elements, rest) = array.as_chunks::<12>();
                let whole = |element: &[u8; 12]| element.starts_with(&8_i32.to_be_bytes());
                if !matches!(dimensions, 0 | 1)
                    || elements.len() != length
                    || !rest.is_empty()
                    || !elements.iter().all(whole)
                {
                    return Err(unreadable());
                }
                elements
            }
        };
        Ok(elements.iter().filter_map(|element| element.last_chunk().copied().map(i64::from_be_bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of (id, name or null, ids).
    fn stream(rows: &[(i64, Option<&str>, &[i64])]) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([0; 8]);
        for (id, name, ids) in rows {
            bytes.extend([0, 3, 0, 0, 0, 8]);
            bytes.extend(id.to_be_bytes());
            match name {
                None => bytes.extend((-1_i32).to_be_bytes()),
                Some(name) => {
                    bytes.extend(i32::try_from(name.len()).unwrap().to_be_bytes());
                    bytes.extend(name.as_bytes());
                }
            }
            let mut array =
                [1_i32, 0, 20, i32::try_from(ids.len()).unwrap(), 1].map(i32::to_be_bytes).concat();
            for id in *ids {
                array.extend(8_i32.to_be_bytes());
                array.extend(id.to_be_bytes());
            }
            bytes.extend(i32::try_from(array.len()).unwrap().to_be_bytes());
            bytes.extend(array);
        }
        bytes.extend((-1_i16).to_be_bytes());
        bytes
    }

    type Read = Vec<(i64, Option<String>, Vec<i64>)>;

    fn read_in_pieces(bytes: &[u8], size: usize) -> Result<Read, Error> {
        let mut rows = Rows::default();
        let mut found = Vec::new();
        for piece in bytes.chunks(size) {
            rows.feed(piece, |[id, name, ids]: [Field<'_>; 3]| {
                found.push((id.int8()?, name.text_or_null()?.map(str::to_owned), ids.int8s()?.collect()));
                Ok(())
            })?;
        }
        rows.end()?;
        Ok(found)
    }

    #[test]
    fn rows_do_not_depend_on_where_the_stream_is_cut() {
        let bytes = stream(&[(1, Some("a"), &[5, -6]), (i64::MIN, None, &[]), (3, Some("äöü"), &[7; 40])]);
        let wanted = vec![
            (1, Some("a".to_owned()), vec![5, -6]),
            (i64::MIN, None, vec![]),
            (3, Some("äöü".to_owned()), vec![7; 40]),
        ];
        for size in 1..=bytes.len() {
            assert_eq!(read_in_pieces(&bytes, size).unwrap(), wanted, "{size}");
        }
    }

    #[test]
    fn stream_cut_short_or_spoilt_is_an_error() {
        let bytes = stream(&[(1, Some("a"), &[5, -6]), (2, None, &[1])]);
        for length in 0..bytes.len() {
            assert!(read_in_pieces(&bytes[..length], 16).is_err(), "{length}");
        }
        assert!(read_in_pieces(&[bytes.clone(), vec![0]].concat(), 1_000).is_err());
        let mut spoilt = bytes;
        spoilt[3] = b'!';
        assert!(read_in_pieces(&spoilt, 1_000).is_err());
    }
}
