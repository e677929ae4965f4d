//! The statements of a node, with the names of its two schemas put in.

use crate::{Error, Schema, sql};

/// What `sql/node/` says where the schema of the outputs is meant.
const OUTPUTS_SCHEMA: &str = "pgonce_node";

pub(super) struct Statements {
    /// The name of the table of outputs.
    pub(super) outputs_table: String,
    pub(super) install: String,
    pub(super) lock: String,
    pub(super) take_turn: String,
    pub(super) turn: String,
    pub(super) process: String,
    pub(super) deliver: String,
    pub(super) lock_topic: String,
    pub(super) relay: String,
    pub(super) poll: String,
    pub(super) offset: String,
    pub(super) commit: String,
    pub(super) rollback: String,
    pub(super) outputs: String,
    pub(super) word_counts: String,
    pub(super) forget_checkpoint: String,
    pub(super) checkpoint: String,
    pub(super) restore: String,
    pub(super) set_state: String,
    pub(super) drop_consumer: String,
    pub(super) drop_topic: String,
    pub(super) empty_outputs: String,
}

impl Statements {
    /// The outputs are in a schema of their own, named after that of pgonce: its own tables cannot be state.
    pub(super) fn of(schema: &Schema) -> Result<Self, Error> {
        let own = Schema::new(format!("{schema}_node"))?;
        let own = format!("\"{own}\"");
        let text = |text: &str| schema.sql(&text.replace(OUTPUTS_SCHEMA, &own));
        Ok(Self {
            outputs_table: format!("{own}.outputs"),
            install: text(include_str!("../../../sql/node/install.sql")),
            lock: text(include_str!("../../../sql/node/lock.sql")),
            take_turn: text(include_str!("../../../sql/node/take_turn.sql")),
            turn: text(include_str!("../../../sql/node/turn.sql")),
            process: text(include_str!("../../../sql/node/process.sql")),
            deliver: text(include_str!("../../../sql/node/deliver.sql")),
            lock_topic: text(include_str!("../../../sql/node/lock_topic.sql")),
            relay: text(sql::RELAY),
            poll: text(include_str!("../../../sql/node/poll.sql")),
            offset: text(include_str!("../../../sql/node/offset.sql")),
            commit: text(include_str!("../../../sql/node/commit.sql")),
            rollback: text(include_str!("../../../sql/node/rollback.sql")),
            outputs: text(include_str!("../../../sql/node/outputs.sql")),
            word_counts: text(include_str!("../../../sql/demo/word_counts.sql")),
            forget_checkpoint: text(include_str!("../../../sql/node/forget_checkpoint.sql")),
            checkpoint: text(include_str!("../../../sql/statements/checkpoint.sql")),
            restore: text(include_str!("../../../sql/statements/restore.sql")),
            set_state: text(include_str!("../../../sql/statements/set_state.sql")),
            drop_consumer: text(include_str!("../../../sql/node/drop_consumer.sql")),
            drop_topic: text(include_str!("../../../sql/node/drop_topic.sql")),
            empty_outputs: text(include_str!("../../../sql/node/empty_outputs.sql")),
        })
    }
}
