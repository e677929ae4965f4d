//! Upgrades: functions and views become those of the program, and what operators and users have made of them stays.

use pgonce::{
    ErrorKind, Migration, Producer, SCHEMA_VERSION, SCHEMA_VERSION_MAX, Schema, TopicSettings, check_version,
    create_topic, migrate,
};
use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::migrate::description;
use crate::probe::{number, texts, word};

/// Programs that start at once.
const STARTERS: usize = 50;
/// As another program of this version leaves it that has one function more, and all others as they are.
const OTHER_PROGRAM: &str = "
    create function pgonce.gone(pgonce.consumers) returns integer return 1;
    comment on function pgonce.gone is 'An older program had it.';
    update pgonce.schema_versions set program = '0.0.1', routines_digest = 'another', routines = routines || '{gone}';";
/// A result, arguments and columns that no `create or replace` can change.
const IRREPLACEABLE: &str = "
    drop function pgonce.cancel;
    create function pgonce.cancel(topic text, message_id text) returns boolean return true;
    drop function pgonce.receive, pgonce.receive_seen;
    drop view pgonce.received;
    create view pgonce.received as select 1 as one, 2 as two;
    create function pgonce.receive_seen(consumer text) returns setof pgonce.received
      begin atomic select r.one, r.two from pgonce.received r; end;";

/// A database whose schema another program of this version has installed.
async fn of_another_program(changes: &str) -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    client.batch_execute(&format!("{OTHER_PROGRAM} {changes}")).await.expect("changed");
    (database, client)
}

#[tokio::test]
async fn an_upgrade_lifts_the_sequence_of_a_promoted_replica_too() {
    let (database, client) = of_another_program("").await;
    client
        .batch_execute("select pgonce.create_topic('t', 1); update pgonce.heads set floor = 1000, next_offset = 1001")
        .await
        .expect("as a logical replica has it");
    let mut upgrader = database.connect().await;
    assert_eq!(
        migrate(&mut upgrader, &Schema::default()).await.expect("upgraded"),
        Migration::Upgraded { from: SCHEMA_VERSION }
    );
    assert_eq!(number(&client, "select last_value from pgonce.outbox_seq").await, 1000);
}

/// A role of this database's own, without rights.
async fn role(client: &Client) -> String {
    let role = texts(client, "select current_database()::text || '_role'").await.remove(0);
    client.batch_execute(&format!("create role {role}")).await.expect("a new role");
    role
}

async fn drop_role(client: &Client, role: &str) {
    client
        .batch_execute(&format!("reset role; drop owned by {role} cascade; drop role {role}"))
        .await
        .expect("dropped");
}

async fn upgrade(client: &mut Client) {
    let migration = migrate(client, &Schema::default()).await.expect("migrated");
    assert_eq!(migration, Migration::Upgraded { from: SCHEMA_VERSION });
    assert_eq!(migrate(client, &Schema::default()).await.expect("migrated"), Migration::Current);
}

#[tokio::test]
async fn what_cannot_be_replaced_is_created_anew_and_what_is_gone_is_dropped() {
    let fresh = TestDatabase::new().await;
    let expected = description(&fresh.connect().await, "pgonce").await;
    for changes in ["", IRREPLACEABLE] {
        let (_database, mut client) = of_another_program(changes).await;
        upgrade(&mut client).await;
        assert_eq!(description(&client, "pgonce").await, expected, "after {changes}");
    }
}

#[tokio::test]
async fn no_function_with_other_arguments_stays_behind() {
    let overload = "
        drop function pgonce.process_once;
        create function pgonce.process_once(consumer text) returns boolean return true;";
    let fresh = TestDatabase::new().await;
    let (_database, mut client) = of_another_program(overload).await;
    upgrade(&mut client).await;
    assert_eq!(description(&client, "pgonce").await, description(&fresh.connect().await, "pgonce").await);
}

#[tokio::test]
async fn what_can_be_replaced_stays_where_users_have_built_on_it() {
    let on_top = "
        create or replace function pgonce.partition_of(key text, partitions integer) returns integer
          language sql stable strict as 'select -1';
        create view public.my_lag as select consumer, lag from pgonce.consumer_lag;
        create table public.mine (id text default pgonce.new_message_id());";
    let (_database, mut client) = of_another_program(on_top).await;
    let schema = Schema::default();
    create_topic(&client, &schema, "t", TopicSettings::default()).await.expect("created");
    let oids = "select string_agg(p.oid::text, ' ' order by p.oid) from pg_proc p
                where p.pronamespace = 'pgonce'::regnamespace and p.proname <> 'gone'";
    let before = texts(&client, oids).await;
    upgrade(&mut client).await;
    assert_eq!(texts(&client, oids).await, before, "a call that is under way finds no function of another oid");
    assert_eq!(number(&client, "select pgonce.partition_of('a', 8)::bigint").await, 2);
    assert_eq!(number(&client, "select count(*) from public.my_lag").await, 0);
    Producer::new("t").send(&client, &word("kept")).await.expect("sent");
}

#[tokio::test]
async fn a_view_of_a_user_that_stands_in_the_way_is_named_and_nothing_is_changed() {
    let on_top = format!(
        "{IRREPLACEABLE} create view public.my_lag as select consumer, lag from pgonce.consumer_lag;
         create function pgonce.mine() returns integer return 1"
    );
    let (_database, mut client) = of_another_program(&on_top).await;
    let before = description(&client, "pgonce").await;
    let error = migrate(&mut client, &Schema::default()).await.expect_err("something depends on it");
    assert!(error.to_string().contains("view public.my_lag depends on view pgonce.consumer_lag"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("pgonce migrate --print")));
    assert_eq!(description(&client, "pgonce").await, before);

    client.batch_execute("drop view public.my_lag").await.expect("out of the way");
    upgrade(&mut client).await;
    assert_eq!(number(&client, "select pgonce.mine()::bigint").await, 1, "a function of a user's own");
}

#[tokio::test]
async fn grants_survive_an_upgrade() {
    for changes in ["", IRREPLACEABLE] {
        let (_database, mut client) = of_another_program(changes).await;
        let role = role(&client).await;
        let grants = format!(
            "grant usage on schema pgonce to {role};
             revoke execute on all functions in schema pgonce from public;
             drop function pgonce.partition_of;
             create function pgonce.partition_of(text) returns integer return 1;
             grant execute on all functions in schema pgonce to {role};
             grant execute on function pgonce.cancel to {role} with grant option;
             revoke execute on function pgonce.partition_of from public;
             grant execute on function pgonce.pause_topic to public;
             grant select on pgonce.outbox_status to {role}, public;
             grant select (consumer, lag), update (consumer) on pgonce.consumer_lag to {role}"
        );
        client.batch_execute(&grants).await.expect("granted");
        let kept = format!(
            "select n from (
               select concat_ws(' ', p.proname, a.privilege_type, a.is_grantable) as n
               from pg_proc p cross join lateral aclexplode(p.proacl) a
               where p.pronamespace = 'pgonce'::regnamespace and a.grantee = '{role}'::regrole and p.proname not in ('gone', 'receive')
               union all
               select concat_ws(' ', c.relname, a.privilege_type, a.grantee = 0) from pg_class c cross join lateral aclexplode(c.relacl) a
               where c.relnamespace = 'pgonce'::regnamespace and a.grantee <> c.relowner
               union all
               select concat_ws(' ', c.relname, t.attname, a.privilege_type)
               from pg_class c join pg_attribute t on t.attrelid = c.oid cross join lateral aclexplode(t.attacl) a
               where c.relnamespace = 'pgonce'::regnamespace) s order by n"
        );
        let before = texts(&client, &kept).await;
        assert!(before.len() > 30, "{before:?}");
        upgrade(&mut client).await;
        assert_eq!(texts(&client, &kept).await, before, "after {changes}");
        let open = "select p.proname::text from pg_proc p where p.pronamespace = 'pgonce'::regnamespace
                    and has_function_privilege('public', p.oid, 'execute') and p.proname not in ('receive', 'pause_topic')";
        assert_eq!(texts(&client, open).await, [""; 0], "PUBLIC was let in again after {changes}");
        drop_role(&client, &role).await;
    }
}

#[tokio::test]
async fn what_an_upgrade_creates_belongs_to_the_owner_of_the_schema() {
    let database = TestDatabase::empty().await;
    let mut client = database.connect().await;
    let role = role(&client).await;
    let as_owner = format!("create schema pgonce authorization {role}; set role {role}");
    client.batch_execute(&as_owner).await.expect("the owner");
    migrate(&mut client, &Schema::default()).await.expect("installed");
    client.batch_execute(&format!("{OTHER_PROGRAM} {IRREPLACEABLE} reset role")).await.expect("changed");
    upgrade(&mut client).await;
    let strangers = format!(
        "select p.proname::text from pg_proc p
         where p.pronamespace = 'pgonce'::regnamespace and p.proowner <> '{role}'::regrole
         union all
         select c.relname from pg_class c
         where c.relnamespace = 'pgonce'::regnamespace and c.relowner <> '{role}'::regrole"
    );
    assert_eq!(texts(&client, &strangers).await, [""; 0]);
    drop_role(&client, &role).await;
}

#[tokio::test]
async fn of_many_that_upgrade_at_once_one_does_it() {
    let (database, client) = of_another_program(IRREPLACEABLE).await;
    let mut starters = JoinSet::new();
    for _ in 0..STARTERS {
        let mut client = database.connect().await;
        starters.spawn(async move { migrate(&mut client, &Schema::default()).await.expect("migrated") });
    }
    let outcomes = starters.join_all().await;
    let upgraded = outcomes.iter().filter(|outcome| matches!(outcome, Migration::Upgraded { .. })).count();
    assert_eq!((upgraded, outcomes.len()), (1, STARTERS));
    assert_eq!(number(&client, "select count(*) from pgonce.schema_versions").await, 1);
}

#[tokio::test]
async fn an_older_program_leaves_the_functions_of_a_newer_one() {
    let (_database, mut client) = of_another_program("").await;
    let schema = Schema::default();
    client.batch_execute("update pgonce.schema_versions set program = '99.0.0'").await.expect("changed");
    assert_eq!(migrate(&mut client, &schema).await.expect("migrated"), Migration::Current);
    check_version(&client, &schema).await.expect("served");
    assert_eq!(number(&client, "select pgonce.gone(null)::bigint").await, 1);
    // Of a candidate for this very version, the functions are older.
    client
        .batch_execute(concat!("update pgonce.schema_versions set program = '", env!("CARGO_PKG_VERSION"), "-rc.1'"))
        .await
        .expect("changed");
    upgrade(&mut client).await;
}

#[tokio::test]
async fn the_next_version_is_served_and_left_alone_and_one_beyond_it_is_refused() {
    let (_database, mut client) = of_another_program("").await;
    let schema = Schema::default();
    let next = format!("update pgonce.schema_versions set version = {SCHEMA_VERSION_MAX}, program = '9.8.7'");
    client.batch_execute(&next).await.expect("the next version");
    check_version(&client, &schema).await.expect("served");
    assert_eq!(migrate(&mut client, &schema).await.expect("left alone"), Migration::Current);
    assert_eq!(number(&client, "select pgonce.gone(null)::bigint").await, 1);

    let beyond = format!("update pgonce.schema_versions set version = {SCHEMA_VERSION_MAX} + 1");
    client.batch_execute(&beyond).await.expect("a version beyond it");
    for error in [
        migrate(&mut client, &schema).await.expect_err("refused"),
        check_version(&client, &schema).await.expect_err("refused"),
    ] {
        assert_eq!(error.kind(), ErrorKind::SchemaTooNew);
        let versions = format!(
            "has version {} (of pgonce 9.8.7), this program works with {SCHEMA_VERSION} and {SCHEMA_VERSION_MAX}",
            SCHEMA_VERSION_MAX + 1
        );
        assert!(error.to_string().contains(&versions), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("9.8.7")));
    }
}

#[tokio::test]
async fn no_table_depends_on_a_function_or_a_view() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let dependent = "
        select pg_describe_object(d.classid, d.objid, d.objsubid)
        from pg_depend d
        where (d.refclassid = 'pg_proc'::regclass
            and d.refobjid in (select oid from pg_proc where pronamespace = 'pgonce'::regnamespace)
          or d.refobjid in (select unnest(array[oid, reltype]) from pg_class
                            where relnamespace = 'pgonce'::regnamespace and relkind = 'v'))
          and d.classid not in ('pg_proc'::regclass, 'pg_rewrite'::regclass, 'pg_type'::regclass)";
    assert_eq!(texts(&client, dependent).await, [""; 0]);
}
