//! The texts of the demo: what is counted, and the count in memory that the database is held against.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, bail};

/// The project's own documents.
const OWN: [(&str, &str); 4] = [
    ("README.md", include_str!("../../../README.md")),
    ("ARCHITECTURE.md", include_str!("../../../ARCHITECTURE.md")),
    ("CONTRIBUTING.md", include_str!("../../../CONTRIBUTING.md")),
    ("CHANGELOG.md", include_str!("../../../CHANGELOG.md")),
];

/// Words of a document: as many as go into one business transaction.
const DOCUMENT_WORDS: usize = 500;
/// Longest word, in bytes: it is a message's key, which has 255 at the most.
const WORD_BYTES_MAX: usize = 255;

/// A piece of text, produced in one transaction.
#[derive(Clone, Debug)]
pub(super) struct Document {
    /// Its name, unlike all others.
    pub(super) id: String,
    /// Its words, in order.
    pub(super) words: Vec<String>,
}

/// Cuts the texts into documents, again and again until there are enough words.
pub(super) fn read(files: &[PathBuf], words_min: u64) -> anyhow::Result<Vec<Document>> {
    let mut texts = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        texts.push((path.display().to_string(), words(&text)));
    }
    if files.is_empty() {
        texts = OWN.iter().map(|(name, text)| ((*name).to_owned(), words(text))).collect();
    }
    if texts.iter().all(|(_, words)| words.is_empty()) {
        bail!("there is no word in these texts");
    }
    let mut documents = Vec::new();
    let mut produced = 0;
    for round in 1_u64.. {
        for (name, words) in &texts {
            for (part, words) in words.chunks(DOCUMENT_WORDS).enumerate() {
                produced += words.len() as u64;
                documents.push(Document { id: format!("{name} {round}.{}", part + 1), words: words.to_vec() });
            }
        }
        if produced >= words_min {
            break;
        }
    }
    Ok(documents)
}

/// How often each word stands in the documents.
pub(super) fn count(documents: &[Document]) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for word in documents.iter().flat_map(|document| &document.words) {
        *counts.entry(word.clone()).or_default() += 1;
    }
    counts
}

/// The words of a text in lower case: runs of letters and digits.
fn words(text: &str) -> Vec<String> {
    text.split(|next: char| !next.is_alphanumeric())
        .map(str::to_lowercase)
        .filter(|word| !word.is_empty() && word.len() <= WORD_BYTES_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_gone_through_until_there_are_enough_words() {
        let documents = read(&[], 20_000).expect("the own texts have words");
        let total: u64 = count(&documents).values().sum();
        assert!(total >= 20_000);
        assert!(documents.iter().all(|document| (1..=DOCUMENT_WORDS).contains(&document.words.len())));
    }

    #[test]
    fn a_word_is_a_run_of_letters_and_digits() {
        assert_eq!(words("Once, ONCE — 2 \u{e9}t\u{e9}s!"), ["once", "once", "2", "\u{e9}t\u{e9}s"]);
    }
}
