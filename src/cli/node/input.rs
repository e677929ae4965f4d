//! Lines as they arrive: what one read finds is handed on together, so that it can become one transaction.

use std::io::{BufRead, BufReader, Read};

use tokio::sync::mpsc::Sender;

use super::protocol::LINE_BYTES_MAX;

/// Bytes of one read. (A pipe holds no more.)
const READ_BYTES_MAX: usize = 64 << 10;

/// A line without its end; none where it was too long, and was passed over.
pub(super) type Bytes = Option<Vec<u8>>;

/// Reads until the end, or until nobody takes the lines. Blocks.
pub(super) fn read(input: impl Read, give: &Sender<Vec<Bytes>>) -> std::io::Result<()> {
    let mut input = BufReader::with_capacity(READ_BYTES_MAX, input);
    let mut line = Some(Vec::new());
    loop {
        let arrived = match input.fill_buf() {
            Ok(arrived) => arrived,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let length = arrived.len();
        let mut lines = Vec::new();
        for part in arrived.split_inclusive(|byte| *byte == b'\n') {
            let text = part.strip_suffix(b"\n");
            line = line.filter(|line| line.len() + part.len() <= LINE_BYTES_MAX);
            if let Some(line) = &mut line {
                line.extend_from_slice(text.unwrap_or(part));
            }
            if text.is_some() {
                lines.push(line.replace(Vec::new()));
            }
        }
        input.consume(length);
        if length == 0 {
            // The last line may have no end.
            lines.extend(Some(line.take()).filter(|line| line.as_ref().is_none_or(|line| !line.is_empty())));
        }
        if !lines.is_empty() && give.blocking_send(lines).is_err() || length == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of an input, however it was read.
    fn lines(input: &[u8]) -> Vec<Bytes> {
        let (give, mut take) = tokio::sync::mpsc::channel(1_000);
        read(input, &give).expect("memory can be read");
        drop(give);
        std::iter::from_fn(move || take.blocking_recv()).flatten().collect()
    }

    #[test]
    fn lines_come_whole_and_in_order_and_the_last_needs_no_end() {
        let long = vec![b'x'; 3 * READ_BYTES_MAX];
        let input = [b"a\n\n", &long[..], b"\nb"].concat();
        assert_eq!(lines(&input), [Some(b"a".to_vec()), Some(Vec::new()), Some(long), Some(b"b".to_vec())]);
        assert_eq!(lines(b"a\n"), [Some(b"a".to_vec())]);
        assert_eq!(lines(b""), []);
    }

    #[test]
    fn a_line_that_is_too_long_is_passed_over() {
        let long = vec![b'x'; LINE_BYTES_MAX + 1];
        assert_eq!(lines(&[&long[..], b"\nb\n", &long[..]].concat()), [None, Some(b"b".to_vec()), None]);
    }
}
