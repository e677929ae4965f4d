//! Tests against a real PostgreSQL: one server a run, a database a test, in parallel, without sleeps.

mod books;
mod docker;
mod fixture;
mod probe;
mod programs;
mod proxy;
mod work;

mod interleaving;

mod campaign;
mod cancellation;
mod commands;
mod connect;
mod consume;
mod container;
mod cut;
mod dead_letter;
mod documents;
mod dump;
mod enqueue;
mod external;
mod fail;
mod fail_model;
mod lease;
mod migrate;
mod misuse;
mod pgbouncer;
mod plans;
mod process;
mod produce;
mod rates;
mod receive;
mod references;
mod relay;
mod retries;
mod roles;
mod schema;
mod silence;
mod sql;
mod suspicion;
mod tidy;
mod topic;
mod upgrade;
mod watch;
mod worker;
