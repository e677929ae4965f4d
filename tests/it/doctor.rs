//! The doctor: what it finds where something was broken on purpose, and that it finds nothing else.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{Schema, migrate, migration_sql};
use serde_json::Value;
use tokio_postgres::{Client, NoTls};

use crate::documents::sql_of_the_readme;
use crate::fixture::TestDatabase;
use crate::probe::{create, eventually, number, texts};
use crate::programs::{Running, outcome, pgonce, postgresql};

pub(crate) const CAN: &str = "System can achieve exactly-once semantics";

/// What the doctor says of a database: its exit code, and its report.
pub(crate) fn report(url: &str) -> (Option<i32>, Value) {
    let output = outcome(&["doctor", "--json", "--database-url", url]);
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}\n{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code(), report)
}

pub(crate) fn findings(report: &Value) -> &[Value] {
    report["findings"].as_array().expect("a list")
}

/// The checks that found something.
pub(crate) fn checks(report: &Value) -> BTreeSet<&str> {
    findings(report).iter().map(|finding| finding["check"].as_str().expect("a name")).collect()
}

/// A server on which nothing is wrong, with the schema, a topic with messages, and a consumer that has received all.
struct Clinic {
    server: PrivateServer,
    client: Client,
}

impl Clinic {
    async fn open() -> Self {
        Self::open_with([
            ("fsync", "on"),
            ("full_page_writes", "on"),
            ("wal_level", "logical"),
            ("max_prepared_transactions", "4"),
        ])
        .await
    }

    async fn open_with<const N: usize>(settings: [(&str, &str); N]) -> Self {
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let start = || PrivateServer::start(&Options { settings }).expect("a server starts");
        let server = tokio::task::spawn_blocking(start).await.expect("no panic");
        let (mut client, connection) = tokio_postgres::connect(&server.url("pgonce"), NoTls).await.expect("connected");
        tokio::spawn(connection);
        // A role of this name would find the schema by itself.
        client
            .batch_execute("alter database pgonce set search_path = public; set search_path = public")
            .await
            .expect("set");
        migrate(&mut client, &Schema::default()).await.expect("installed");
        create(&client, "words", 1, "counter").await;
        create(&client, "letters", 1, "reader").await;
        let clinic = Self { server, client };
        clinic.run("select pgonce.enqueue('words', '1'), pgonce.enqueue('words', '2')").await;
        clinic.run("select pgonce.relay()").await;
        clinic.run("select pgonce.receive('counter')").await;
        clinic
    }

    fn url(&self) -> String {
        self.server.url("pgonce")
    }

    async fn run(&self, statements: &str) {
        if let Err(error) = self.client.batch_execute(statements).await {
            panic!("{statements}\n{error:?}");
        }
    }

    /// Checks that the doctor finds just this, and says whether it is a fault; the report.
    fn expect(&self, what: &str, expected: &[&str], is_fault: bool) -> Value {
        let (code, report) = report(&self.url());
        assert_eq!(checks(&report), expected.iter().copied().collect(), "{what}\n{report:#}");
        assert_eq!(code, Some(i32::from(is_fault)), "{what}");
        assert_eq!(report["can_achieve_exactly_once"], !is_fault, "{what}");
        report
    }

    /// Breaks something, and expects it to be found; then mends it by the remedies, or as is said here.
    async fn case(&self, break_it: &str, expected: &[&str], mend_it: Option<&str>) {
        self.run(break_it).await;
        let is_fault = !matches!(expected, ["autovacuum" | "xmin-horizon"]);
        let report = self.expect(break_it, expected, is_fault);
        match mend_it {
            Some(statements) => self.run(statements).await,
            None => {
                for finding in findings(&report) {
                    self.run(finding["remedy"].as_str().expect("text")).await;
                }
            }
        }
    }

    async fn close(self) {
        drop(self.client);
        tokio::task::spawn_blocking(move || self.server.stop()).await.expect("no panic").expect("it stops");
    }
}

#[tokio::test]
async fn what_is_broken_in_the_schema_is_found_and_the_remedy_helps() {
    let clinic = Clinic::open().await;
    clinic.expect("nothing is broken", &[], false);
    let output = outcome(&["doctor", "--database-url", &clinic.url()]);
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stdout)), (Some(0), format!("{CAN}\n").into()));

    for (break_it, expected) in [
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
        ("alter table pgonce.outbox drop constraint outbox_status_check", "constraints"),
        ("alter table pgonce.consumers drop constraint consumers_topic_id_fkey", "constraints"),
        (
            "alter table pgonce.leases drop constraint leases_epoch_check,
             add constraint leases_epoch_check check (epoch >= 0) not valid",
            "constraints",
        ),
        ("drop index pgonce.outbox_in_order", "indexes"),
        (
            "drop index pgonce.dead_letters_dead; create index dead_letters_dead on pgonce.dead_letters (partition)",
            "indexes",
        ),
        ("update pg_index set indisvalid = false where indexrelid = 'pgonce.parked_key'::regclass", "indexes"),
        ("alter table pgonce.processed_ids set unlogged", "unlogged-tables"),
        ("alter table pgonce.consumers disable trigger all", "triggers"),
        ("select setval('pgonce.outbox_seq', 1)", "sequences"),
        ("select setval(pg_get_serial_sequence('pgonce.topics', 'topic_id'), 1)", "sequences"),
        ("select setval(pg_get_serial_sequence('pgonce.consumers', 'consumer_id'), 1, false)", "sequences"),
        ("alter sequence pgonce.outbox_seq cache 10", "sequence-settings"),
        ("alter table pgonce.heads set (autovacuum_enabled = off)", "autovacuum"),
    ] {
        clinic.case(break_it, &[expected], None).await;
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
    clinic.expect("all is mended", &[], false);
    clinic.close().await;
}

#[tokio::test]
async fn the_lists_have_all_that_the_migrations_make() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let constraints = include_str!("../../sql/doctor/constraints.sql");
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
    let tables = include_str!("../../sql/doctor/tables.sql");
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
async fn nothing_is_wrong_while_a_worker_runs_whatever_the_search_path_is() {
    let clinic = Clinic::open().await;
    let url = clinic.url();
    let arguments = ["run", "--database-url", &url, "--word-count", "counter=words"];
    let worker = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::null()));
    eventually("it is a member", async || {
        (number(&clinic.client, "select count(*) from pgonce.members").await == 1).then_some(())
    })
    .await;
    clinic.run(include_str!("hostile.sql")).await;
    clinic.run("alter database pgonce set search_path = evil, pg_catalog").await;
    clinic.run("select pgonce.enqueue('words', '{\"word\": \"a\"}') from pg_catalog.generate_series(1, 1000)").await;
    clinic.expect("a worker runs", &[], false);
    worker.finish();
    clinic.close().await;
}

#[tokio::test]
async fn functions_and_views_that_were_altered_are_found_and_installed_anew() {
    let clinic = Clinic::open().await;
    let anew = migration_sql(&Schema::default(), 1);
    let leave = "create or replace function pgonce.leave(member_id uuid) returns void language plpgsql volatile
                 security definer set search_path = pg_catalog, pg_temp as $$ begin end $$";
    for break_it in [
        leave,
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
async fn what_is_set_wrongly_at_the_server_is_found() {
    // Of a private server fsync and full_page_writes are off.
    let clinic = Clinic::open_with([("synchronous_commit", "off"), ("autovacuum", "off")]).await;
    clinic.expect("settings", &["autovacuum", "fsync", "full-page-writes", "synchronous-commit"], true);
    clinic.close().await;
    let clinic = Clinic::open().await;
    for break_it in [
        "alter database pgonce set synchronous_commit = off",
        "alter role pgonce set synchronous_commit = off",
        "create role clerk; alter role clerk in database pgonce set synchronous_commit to off",
    ] {
        clinic.case(break_it, &["synchronous-commit"], None).await;
    }
    for (break_it, expected, mend_it) in [
        (
            "alter database pgonce set default_transaction_read_only = on",
            "read-only",
            "alter database pgonce reset default_transaction_read_only",
        ),
        (
            "alter role pgonce set session_replication_role = replica",
            "triggers",
            "alter role pgonce reset session_replication_role",
        ),
        (
            "select pg_create_logical_replication_slot('forgotten', 'pgoutput')",
            "xmin-horizon",
            "select pg_drop_replication_slot('forgotten')",
        ),
        (
            "begin; select pg_current_xact_id(); prepare transaction 'forgotten'",
            "prepared-transactions",
            "rollback prepared 'forgotten'",
        ),
    ] {
        clinic.case(break_it, &[expected], Some(mend_it)).await;
    }
    clinic.expect("all is mended", &[], false);

    let program = postgresql("pg_receivewal").expect("it comes with the server");
    let directory = tempfile::tempdir().expect("a directory");
    let url = clinic.url();
    let mut receive = Command::new(program);
    receive.args(["--no-loop", "--directory"]).arg(directory.path()).args(["--dbname", &url]);
    let replica = Running::start(receive.stdout(Stdio::null()).stderr(Stdio::null()));
    let streaming = "select count(*) from pg_stat_replication where state = 'streaming'";
    eventually("it streams", async || (number(&clinic.client, streaming).await == 1).then_some(())).await;
    clinic.expect("a replica", &["asynchronous-replicas"], true);
    drop(replica);
    clinic.close().await;
}

#[tokio::test]
async fn consumers_that_promise_less_or_stand_still_are_found() {
    let clinic = Clinic::open().await;
    let gone = "00000000-0000-0000-0000-000000000001";
    clinic
        .case(
            "select pgonce.create_consumer('mail', 'words', kind => 'external', start_at => 'latest')",
            &["external-consumers"],
            Some("select pgonce.drop_consumer('mail')"),
        )
        .await;
    clinic
        .case(
            &format!(
                "select pgonce.create_consumer('mail', 'words', kind => 'external', start_at => 'latest');
                 update pgonce.leases set owner = '{gone}', leased_until = now() + interval '1 hour', was_member = true"
            ),
            &["dead-owners", "external-consumers"],
            Some("select pgonce.drop_consumer('mail')"),
        )
        .await;
    for (break_it, expected, mend_it) in [
        (
            // As a dump has it that was restored at once: the process is of another server.
            &*format!("insert into pgonce.members (member_id, pid, consumers) values ('{gone}', 0, '{{counter}}')"),
            &["dead-owners"][..],
            "delete from pgonce.members",
        ),
        (
            &*format!(
                "insert into pgonce.suspicions (consumer_id, partition, until_offset, messages, tried_by)
                 select consumer_id, 0, 1, 1, '{gone}' from pgonce.consumers where consumer = 'counter'"
            ),
            &["dead-owners"],
            "delete from pgonce.suspicions",
        ),
        (
            "insert into pgonce.progress (consumer_id, partition, generation, next_offset, received, duplicates, handler, handed_over)
             select consumer_id, partition, 1000, next_offset, received, duplicates, pg_current_xact_id(), '{1}'
             from pgonce.consumer_offsets where consumer = 'counter'",
            &["dead-owners", "weaker-modes"],
            "delete from pgonce.progress where generation = 1000",
        ),
        // 2 ^ (66 / 4) microseconds are 93 ms.
        (
            "select pgonce.record_handler_times('counter', 100, '{20, 66}', '{1, 9}')",
            &["slow-handlers"],
            "delete from pgonce.handler_times",
        ),
        (
            "select pgonce.enqueue('words', '3'); commit; select pgonce.relay()",
            &["unattended-consumers"],
            "select pgonce.receive('counter')",
        ),
    ] {
        clinic.case(break_it, expected, Some(mend_it)).await;
    }
    // Of many, no more are told than somebody reads.
    clinic.run("insert into pgonce.members select gen_random_uuid(), 0, '{}' from generate_series(1, 105)").await;
    let many = clinic.expect("many are dead", &["dead-owners"], true);
    assert_eq!(findings(&many).len(), 101);
    assert_eq!(findings(&many)[100]["subject"], "5 more");
    clinic.run("delete from pgonce.members").await;
    clinic.expect("all is mended", &[], false);
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

#[tokio::test]
async fn a_worker_that_was_killed_is_a_dead_owner_until_another_one_runs() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let start = || {
        let arguments = ["run", "--database-url", &database.url, "--word-count", "counter=words"];
        Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::null()))
    };
    let finds_dead = || checks(&report(&database.url).1).contains("dead-owners");
    let members = async || number(&client, "select count(*) from pgonce.members").await;
    let mut worker = start();
    eventually("it is a member", async || (members().await == 1).then_some(())).await;
    worker.kill();
    eventually("its connection is gone", async || finds_dead().then_some(())).await;
    assert_eq!(report(&database.url).0, Some(1));
    let worker = start();
    eventually("the dead one is buried", async || (!finds_dead()).then_some(())).await;
    worker.finish();
}

#[tokio::test]
async fn a_role_is_told_what_it_may_not_see_and_which_grants_are_missing() {
    let clinic = Clinic::open().await;
    let roles = sql_of_the_readme().into_iter().find(|block| block.contains("create role")).expect("a snippet");
    clinic.run(&roles).await;
    clinic.run("create role clerk login in role pgonce_reader").await;
    clinic.expect("the roles of the README", &[], false);

    let url = clinic.url().replace("user=pgonce", "user=clerk").replace("//pgonce@", "//clerk@");
    assert_ne!(url, clinic.url());
    let (code, report) = report(&url);
    assert_eq!(code, Some(1));
    assert_eq!(checks(&report), ["unexamined"].into(), "{report:#}");
    let told = findings(&report).iter().map(|finding| format!("{} {}\n", finding["subject"], finding["remedy"]));
    let told: String = told.collect();
    for what in [
        "dead-owners: permission denied",
        "asynchronous-replicas: ",
        "autovacuum, xmin-horizon: ",
        "such as partition_heads",
    ] {
        assert!(told.contains(what), "{what}\n{told}");
    }
    assert!(told.contains("grant pgonce to clerk"), "{told}");
    assert!(told.contains("grant pg_read_all_stats to clerk"), "{told}");

    // Each grant of the worker and of the producer, taken away, is missed.
    let grants = "
        select format('%s on %s from %s', a.privilege_type, what, a.grantee::regrole)
        from (
          select 'function ' || p.oid::regprocedure as what, p.proacl as acl from pg_proc p where p.pronamespace = 'pgonce'::regnamespace
          union all
          select case c.relkind when 'S' then 'sequence ' else '' end || c.oid::regclass, c.relacl
          from pg_class c where c.relnamespace = 'pgonce'::regnamespace
          union all
          select 'schema pgonce', n.nspacl from pg_namespace n where n.nspname = 'pgonce') o
        cross join lateral aclexplode(o.acl) a
        where a.grantee in ('pgonce_worker'::regrole, 'pgonce_producer'::regrole)";
    let examine = include_str!("../../sql/doctor/grants.sql");
    let mut taken = 0;
    for grant in texts(&clinic.client, grants).await {
        // Whoever may not call it at all is none of those.
        if grant.contains("pgonce.receive(") || grant.contains("pgonce.enqueue(") {
            continue;
        }
        clinic.run(&format!("begin; revoke {grant}")).await;
        let found = clinic.client.query(examine, &[]).await.expect("it answers");
        assert_eq!(found.len(), 1, "{grant}");
        clinic.run(found[0].get("remedy")).await;
        assert!(clinic.client.query(examine, &[]).await.expect("it answers").is_empty(), "{grant}");
        clinic.run("rollback").await;
        taken += 1;
    }
    assert!(taken > 40, "only {taken} grants");
    clinic.run("revoke execute on function pgonce.watch from pgonce_worker").await;
    clinic.expect("a grant is missing", &["grants"], true);
    // Who logs in has it by way of another role.
    clinic.run("create role other; grant execute on function pgonce.watch to other").await;
    clinic.run("create role ferdinand login in role pgonce_worker, other").await;
    clinic.expect("two roles together", &[], false);
    clinic.close().await;
}
