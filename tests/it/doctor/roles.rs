//! What a role may not see, and what it should be able to do.

use super::{Clinic, checks, findings, report};
use crate::documents::sql_of_the_readme;
use crate::probe::texts;

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
    assert_eq!(checks(&report), ["unexamined", "unexamined-warnings"].into(), "{report:#}");
    let told = findings(&report).iter().map(|finding| format!("{} {}\n", finding["subject"], finding["remedy"]));
    let told: String = told.collect();
    for what in ["dead-owners: permission denied", "autovacuum, xmin-horizon: ", "such as partition_of"] {
        assert!(told.contains(what), "{what}\n{told}");
    }
    // The owner is a superuser here: nobody is to be given its rights.
    assert!(told.contains("\"run the doctor as pgonce\"") && !told.contains("grant pgonce to clerk"), "{told}");

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
    let examine = include_str!("../../../sql/doctor/grants.sql");
    let mut taken = 0;
    for grant in texts(&clinic.client, grants).await {
        // Whoever may not call it at all is none of those.
        if grant.contains("pgonce.beat(") || grant.contains("pgonce.enqueue_many(") {
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
    // Who works by SQL needs what it calls.
    let by_sql = "create role shop login; grant usage on schema pgonce to shop; grant execute on function pgonce.enqueue to shop";
    clinic.run(by_sql).await;
    clinic.expect("a role that only enqueues", &[], false);
    clinic.run("revoke execute on function pgonce.watch from pgonce_worker").await;
    clinic.expect("a grant is missing", &["grants"], true);
    // Who logs in has it by way of another role.
    clinic.run("create role other; grant execute on function pgonce.watch to other").await;
    clinic.run("create role ferdinand login in role pgonce_worker, other").await;
    clinic.expect("two roles together", &[], false);
    clinic.close().await;
}
