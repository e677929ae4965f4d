//! Tables for people.

use comfy_table::{Table, presets};

/// A table with a head; plain enough for a pipe.
pub(super) fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head);
    for row in rows {
        table.add_row(row);
    }
    table
}
