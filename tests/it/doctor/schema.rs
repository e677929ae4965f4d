//! What is wrong with the schema: its constraints, tables, functions and views, and those beside it.

use pgonce::{Schema, migration_sql};

use super::{CAN, Clinic, findings};
use crate::fixture::TestDatabase;
use crate::probe::{number, texts};
use crate::programs::outcome;

/// What breaks a schema, and the check that finds it; the remedy that it tells mends it.
const BROKEN: &[(&str, &str)] = &[
    ("alter table pgonce.outbox drop constraint outbox_pkey", "producer-deduplication"),
    ("alter table pgonce.queue drop constraint queue_message_id_key", "queue-deduplication"),
    ("alter table pgonce.queue drop constraint queue_pkey", "queue-deduplication"),
    ("alter table pgonce.processed_ids drop constraint processed_ids_pkey", "consumer-deduplication"),
    ("alter table pgonce.progress drop constraint progress_pkey", "consumer-deduplication"),
    (
        "alter table pgonce.processed_ids drop constraint processed_ids_pkey,
             add constraint processed_ids_pkey primary key (consumer_id, message_id) deferrable",
        "consumer-deduplication",
    ),
    (
        "alter table pgonce.queue drop constraint queue_message_id_key,
             add constraint queue_message_id_key unique (topic_id, message_id, \"offset\")",
        "queue-deduplication",
    ),
    (
        "update pg_index set indisvalid = false where indexrelid = 'pgonce.processed_ids_pkey'::regclass",
        "consumer-deduplication",
    ),
    ("alter table pgonce.outbox rename constraint outbox_pkey to first_key", "producer-deduplication"),
    ("alter table pgonce.outbox drop constraint outbox_status_check", "constraints"),
    ("alter table pgonce.consumers drop constraint consumers_topic_id_fkey", "constraints"),
    (
        "alter table pgonce.leases drop constraint leases_epoch_check,
             add constraint leases_epoch_check check (epoch >= 0) not valid",
        "constraints",
    ),
    ("alter table pgonce.outbox add constraint nothing check (false) not valid", "constraints"),
    ("create unique index one_a_topic on pgonce.set_aside (topic_id)", "indexes"),
    ("drop index pgonce.outbox_in_order", "indexes"),
    (
        "drop index pgonce.dead_letters_dead; create index dead_letters_dead on pgonce.dead_letters (partition)",
        "indexes",
    ),
    (
        "drop index pgonce.dead_letters_dead; create unique index dead_letters_dead on pgonce.dead_letters (dead_letter_id)",
        "indexes",
    ),
    (
        "drop index pgonce.dead_letters_dead;
             create unique index dead_letters_dead on pgonce.dead_letters (consumer_id, partition, \"offset\")",
        "indexes",
    ),
    ("update pg_index set indisvalid = false where indexrelid = 'pgonce.parked_key'::regclass", "indexes"),
    ("alter table pgonce.processed_ids set unlogged", "unlogged-tables"),
    ("alter table pgonce.consumers disable trigger all", "triggers"),
    ("create rule forget as on insert to pgonce.processed_ids do instead nothing", "triggers"),
    (
        "create trigger twice before update on pgonce.queue for each row execute function suppress_redundant_updates_trigger()",
        "triggers",
    ),
    ("alter table pgonce.samples enable row level security", "tables"),
    ("alter table pgonce.word_counts add column note text not null", "tables"),
    ("alter table pgonce.set_aside rename column reason to why", "tables"),
    ("create role another; alter function pgonce.enqueue owner to another", "grants"),
    ("alter table pgonce.samples owner to another", "grants"),
    ("select setval('pgonce.outbox_seq', 1)", "sequences"),
    ("select setval(pg_get_serial_sequence('pgonce.topics', 'topic_id'), 1)", "sequences"),
    ("select setval(pg_get_serial_sequence('pgonce.consumers', 'consumer_id'), 1, false)", "sequences"),
    ("alter sequence pgonce.outbox_seq cache 10", "sequence-settings"),
    ("alter table pgonce.heads set (autovacuum_enabled = off)", "autovacuum"),
];

#[tokio::test]
async fn what_is_broken_in_the_schema_is_found_and_the_remedy_helps() {
    let clinic = Clinic::open().await;
    clinic.expect("nothing is broken", &[], false);
    let output = outcome(&["doctor", "--database-url", &clinic.url()]);
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stdout)), (Some(0), format!("{CAN}\n").into()));

    for (break_it, expected) in BROKEN {
        clinic.case(break_it, &[*expected], None).await;
    }
    for (break_it, expected, mend_it) in [
        (
            "alter table pgonce.outbox alter column payload drop not null",
            "tables",
            "alter table pgonce.outbox alter column payload set not null",
        ),
        ("alter table pgonce.samples rename to away", "tables", "alter table pgonce.away rename to samples"),
        (
            "alter table pgonce.set_aside alter column reason type varchar(80)",
            "tables",
            "alter table pgonce.set_aside alter column reason type text",
        ),
        (
            "create schema pgonce_scenario_1; create table pgonce_scenario_1.schema_versions (like pgonce.schema_versions);
             insert into pgonce_scenario_1.schema_versions table pgonce.schema_versions",
            "orphaned-schemas",
            "drop schema pgonce_scenario_1 cascade",
        ),
        (
            "create schema pgonce_demo; create table pgonce_demo.schema_versions (like pgonce.schema_versions)",
            "orphaned-schemas",
            "drop schema pgonce_demo cascade",
        ),
        (
            "create schema events; create table events.schema_versions (like pgonce.schema_versions);
             insert into events.schema_versions select 99, program, '', '{}', now() from pgonce.schema_versions",
            "orphaned-schemas",
            "update events.schema_versions set version = 1",
        ),
        (
            "delete from events.schema_versions",
            "orphaned-schemas",
            "drop schema events cascade",
        ),
        (
            "create schema \"a b\"; create table \"a b\".schema_versions (like pgonce.schema_versions)",
            "orphaned-schemas",
            "drop schema \"a b\" cascade",
        ),
        (
            "create table state (id integer); insert into pgonce.state_tables select consumer_id, 'state' from pgonce.consumers;
             alter table state set unlogged",
            "unlogged-tables",
            "delete from pgonce.state_tables; drop table state",
        ),
    ] {
        clinic.case(break_it, &[expected], Some(mend_it)).await;
    }
    // Which is which nobody could tell, and none is to be dropped for it.
    let rename = "alter table pgonce.samples rename column retries to one; alter table pgonce.samples rename column dead_letters to two";
    clinic.run(rename).await;
    let report = clinic.expect("two names", &["tables"], true);
    assert_eq!(findings(&report).len(), 4, "{report:#}");
    let remedies = findings(&report).iter().map(|finding| finding["remedy"].to_string());
    assert!(remedies.into_iter().all(|remedy| !remedy.contains("alter table")), "{report:#}");
    let back = "alter table pgonce.samples rename column one to retries; alter table pgonce.samples rename column two to dead_letters";
    clinic.run(back).await;
    // A play that is going on.
    clinic
        .run(
            "create schema pgonce_scenario_2; create table pgonce_scenario_2.schema_versions (like pgonce.schema_versions);
             insert into pgonce_scenario_2.schema_versions table pgonce.schema_versions;
             select pg_advisory_lock(hashtextextended('pgonce_scenario_2', 0))",
        )
        .await;
    clinic.expect("all is mended", &[], false);
    clinic.close().await;
}

#[tokio::test]
async fn the_lists_have_all_that_the_migrations_make() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let constraints = include_str!("../../../sql/doctor/constraints.sql");
    let made = "
        select format('(%L, %L, %L)', c.relname, k.conname, pg_get_constraintdef(k.oid))
        from pg_constraint k join pg_class c on c.oid = k.conrelid
        where c.relnamespace = 'pgonce'::regnamespace and c.relkind = 'r' and k.contype in ('c', 'f', 'p', 'u')
        union all
        select format('(%L, %L, %L)', c.relname, x.relname, pg_get_indexdef(x.oid))
        from pg_index i join pg_class c on c.oid = i.indrelid join pg_class x on x.oid = i.indexrelid
        where c.relnamespace = 'pgonce'::regnamespace
          and not exists (select from pg_constraint k where k.conindid = x.oid and k.conrelid = c.oid)";
    let made = texts(&client, made).await;
    assert_eq!(made.len(), constraints.matches("\n  ('").count());
    for one in made {
        assert!(constraints.contains(&one), "{one}");
    }
    let tables = include_str!("../../../sql/doctor/tables.sql");
    let made = "select relname::text from pg_class where relnamespace = 'pgonce'::regnamespace and relkind = 'r'";
    let made = texts(&client, made).await;
    assert_eq!(made.len(), tables.matches("\n  ('").count());
    for one in made {
        assert!(tables.contains(&format!("\n  ('{one}',\n")), "{one}");
    }
    let columns = "
        select count(*) from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
        where c.relnamespace = 'pgonce'::regnamespace and c.relkind = 'r'";
    let listed = tables.lines().filter(|line| line.starts_with("   '")).map(|line| 1 + line.matches(", ").count());
    assert_eq!(i64::try_from(listed.sum::<usize>()).expect("small"), number(&client, columns).await);
}

#[tokio::test]
async fn functions_and_views_that_were_altered_are_found_and_installed_anew() {
    let clinic = Clinic::open().await;
    let anew = migration_sql(&Schema::default(), 1);
    let leave = "create or replace function pgonce.leave(member_id uuid) returns void language plpgsql volatile
                 security definer set search_path = pg_catalog, pg_temp as $$ begin end $$";
    let receive = "create or replace function pgonce.receive(
          consumer text, max integer default 1000, partition integer default null, max_bytes bigint default 8388608,
          suspects boolean default true)
        returns setof pgonce.received_message language sql stable rows 1000
        begin atomic
          select r.consumer, r.partition, r.\"offset\", r.message_id, r.key, r.payload, r.headers, r.enqueued_at, r.attempt
          from pgonce.receive_seen(
            receive.consumer, receive.max, receive.partition, receive.max_bytes, true,
            pgonce.seen_progress(receive.consumer, receive.partition)) r;
        end";
    for break_it in [
        leave,
        receive,
        "alter function pgonce.receive volatile",
        "alter function pgonce.partition_of called on null input",
        "create function pgonce.enqueue(topic text, payload jsonb) returns void language sql as 'select'",
        "create or replace function pgonce.partition_of(key text, partitions integer) returns integer
         language sql stable strict parallel safe return mod(hashtext(key), partitions)",
        "create or replace function pgonce.is_watched() returns boolean language sql volatile return false",
        "create or replace function pgonce.new_message_id() returns text
         language sql volatile parallel safe as 'select gen_random_uuid()::text'",
        "drop function pgonce.leave",
        "alter function pgonce.leave security invoker",
        "alter function pgonce.leave reset search_path",
        "alter function pgonce.relay_page set lock_timeout = '1s'",
        "create or replace view pgonce.consumer_leases as
         select c.consumer, l.partition, l.epoch, l.owner, l.leased_until, l.fenced, l.careful_until
         from pgonce.leases l join pgonce.consumers c using (consumer_id)
         where l.epoch > 0
         order by c.consumer, l.partition",
        "drop view pgonce.dead_letter_list",
    ] {
        clinic.case(break_it, &["routines"], Some(&anew)).await;
    }
    let break_it = "alter function pgonce.leave set synchronous_commit = off";
    clinic.case(break_it, &["routines", "synchronous-commit"], Some(&anew)).await;
    let break_it = "update pgonce.schema_versions set program = '99.0.0', routines_digest = ''";
    clinic.case(break_it, &["version"], Some(&anew)).await;
    clinic.expect("all is mended", &[], false);
    clinic.close().await;
}

#[tokio::test]
async fn a_schema_that_the_program_cannot_work_with_is_all_that_is_found() {
    let clinic = Clinic::open().await;
    for (break_it, remedy, mend_it) in [
        (
            "alter schema pgonce rename to away",
            "alter schema away rename to \"pgonce\"",
            "alter schema away rename to pgonce",
        ),
        ("update pgonce.schema_versions set version = 99", "or later", "update pgonce.schema_versions set version = 1"),
        (
            "create table kept as table pgonce.schema_versions; delete from pgonce.schema_versions",
            "schema_versions is empty",
            "insert into pgonce.schema_versions table kept",
        ),
    ] {
        clinic.run(break_it).await;
        let report = clinic.expect(break_it, &["schema"], true);
        assert_eq!(findings(&report).len(), 1);
        assert!(findings(&report)[0]["remedy"].as_str().expect("text").contains(remedy), "{report:#}");
        clinic.run(mend_it).await;
    }
    clinic.expect("all is mended", &[], false);
    let output = outcome(&["doctor", "--json", "--database-url", "postgresql://127.0.0.1:1/x"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    assert!(output.stderr.starts_with(b"error: "));
    clinic.close().await;
}

#[tokio::test]
async fn names_that_somebody_chose_do_no_harm() {
    let clinic = Clinic::open().await;
    clinic
        .run(
            r#"create schema "pgonce_demo""; drop table users; --";
               create table "pgonce_demo""; drop table users; --".schema_versions (like pgonce.schema_versions);
               select pgonce.create_consumer(E'\x1b[31m$(reboot)', 'words', start_at => 'earliest')"#,
        )
        .await;
    let report = clinic.expect("names", &["orphaned-schemas", "unattended-consumers"], true);
    let remedies: Vec<&str> =
        findings(&report).iter().map(|finding| finding["remedy"].as_str().expect("text")).collect();
    assert!(remedies[0].ends_with(r#"drop schema "pgonce_demo""; drop table users; --" cascade"#), "{remedies:?}");
    assert!(remedies[1].ends_with("pgonce consumer delete '\x1b[31m$(reboot)'"), "{remedies:?}");
    let output = outcome(&["doctor", "--database-url", &clinic.url()]);
    assert!(!output.stdout.contains(&0x1b), "{}", String::from_utf8_lossy(&output.stdout));
    clinic.close().await;
}
