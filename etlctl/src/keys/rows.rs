//! Reads the table's rows and writes them back in batches. Rows are identified by `ctid`, because the table has no key.

use login_etl::mapping::{Mapping, quoted};
use tokio_postgres::{
    Client, Row,
    error::SqlState,
    types::{ToSql, Type},
};

use crate::output::{Failure, failed, sql};

/// Approximate rows of a full block. If a block has more, a batch ends in the middle of its last block.
const ROWS_A_BLOCK: i64 = 50;

/// A table that stores rows: the mapping's table, or a partition of it.
pub(super) struct Leaf {
    pub(super) name: String,
    pub(super) blocks: i64,
}

/// A row's place in its table: the block, from 0, and the line pointer in it, from 1. A pass continues after it.
#[derive(Clone, Copy)]
pub(super) struct RowId {
    pub(super) block: i64,
    line: i32,
}

impl RowId {
    /// Before the first row.
    pub(super) const START: Self = Self { block: 0, line: 0 };

    /// From the text form of a `ctid`, `(block,line)`.
    fn parse(ctid: &str) -> Option<Self> {
        let (block, line) = ctid.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
        Some(Self { block: block.parse().ok()?, line: line.parse().ok()? })
    }
}

/// The mapping's table, or all of its partitions.
pub(super) async fn leaves(mapping: &Mapping, client: &Client) -> Result<Vec<Leaf>, Failure> {
    let query = "
        with recursive tree (oid) as (
            select $1::text::regclass::oid
            union all
            select inhrelid from pg_inherits join tree on inhparent = tree.oid
        )
        select tree.oid::regclass::text, pg_relation_size(tree.oid) / current_setting('block_size')::bigint
        from pg_class join tree on pg_class.oid = tree.oid
        where relkind = 'r'";
    let table = mapping.table().to_string();
    let rows = client.query(query, &[&table]).await.map_err(sql("look at the table"))?;
    Ok(rows.iter().map(|row| Leaf { name: row.get(0), blocks: row.get(1) }).collect())
}

/// The statements that read and write a batch.
pub(super) struct Statements {
    leaf: String,
    columns: Vec<String>,
    /// Most rows of a batch.
    rows: i64,
    read: String,
    write: String,
}

impl Statements {
    /// Rows whose masks are all under the key `but` are not read.
    pub(super) fn new(mapping: &Mapping, leaf: &str, rows: i64, but: Option<&str>) -> Self {
        let columns: Vec<_> = mapping.recoverable().map(|(column, _)| quoted(&column.name)).collect();
        let each = |form: &dyn Fn(usize, &str) -> String, separator: &str| {
            let forms: Vec<_> = columns.iter().enumerate().map(|(number, column)| form(number, column)).collect();
            forms.join(separator)
        };
        let done = match but {
            None => "false".to_owned(),
            Some("") => each(&|_, column| format!("coalesce(position(':' in {column}) = 0, true)"), " and "),
            // A key's id has no quotes in it.
            Some(id) => {
                each(&|_, column| format!("coalesce(left({column}, {}) = '{id}:', true)", id.len() + 1), " and ")
            }
        };
        // A list of ctids works on every version; range scans of ctids need version 14. A block holds at most this many line
        // pointers, because a row needs 28 bytes: a line pointer of 4, and a header of 24.
        let read = format!(
            "select old.ctid::text, {} from only {leaf} as old where old.ctid = any (array(
                 select format('(%s,%s)', block, line)::tid
                 from generate_series($1::bigint, $3::bigint - 1) block,
                      generate_series(1, (current_setting('block_size')::integer - 24) / 28) line
                 where block > $1 or line > $2::integer
             )) and not ({done}) order by old.ctid limit {rows}",
            columns.join(", ")
        );
        let write = format!(
            "update only {leaf} as old set {}
             from unnest($1::text[]::tid[], {}) as batch (ctid, {})
             where old.ctid = any ($1::text[]::tid[]) and old.ctid = batch.ctid and {}",
            each(&|number, column| format!("{column} = batch.new_{number}"), ", "),
            (2..2 + 2 * columns.len()).map(|number| format!("${number}::text[]")).collect::<Vec<_>>().join(", "),
            each(&|number, _| format!("old_{number}, new_{number}"), ", "),
            each(&|number, column| format!("old.{column} is not distinct from batch.old_{number}"), " and "),
        );
        Self { leaf: leaf.to_owned(), columns, rows, read, write }
    }

    fn no_right(&self, error: tokio_postgres::Error, what: &str) -> Failure {
        if error.code() != Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
            return sql(what)(error);
        }
        let columns = self.columns.join(", ");
        failed(format!(
            "your database user may not remask {0}: it needs the role login_etl_operator, and the owner must `grant select, \
             update ({columns}) on {0} to login_etl_operator`",
            self.leaf
        ))
    }

    /// The next rows after `from`, of blocks before `end` and at most a batch; and the place to continue after.
    pub(super) async fn read(&self, client: &Client, from: RowId, end: i64) -> Result<(Vec<Row>, RowId), Failure> {
        let end = end.min(from.block + self.rows / ROWS_A_BLOCK + 1);
        let parameters: [(&(dyn ToSql + Sync), Type); 3] =
            [(&from.block, Type::INT8), (&from.line, Type::INT4), (&end, Type::INT8)];
        let rows = client.query_typed(&self.read, &parameters).await;
        let rows = rows.map_err(|error| self.no_right(error, "read rows"))?;
        let is_full = rows.len() as i64 == self.rows;
        let last = rows.last().filter(|_| is_full).and_then(|row| RowId::parse(row.get(0)));
        Ok((rows, last.unwrap_or(RowId { block: end, line: 0 })))
    }

    /// Writes the new masks to rows that still have the old ones. Returns the number of rows changed.
    pub(super) async fn write(&self, client: &Client, changes: &Changes<'_>) -> Result<u64, Failure> {
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> = vec![(&changes.row_ids, Type::TEXT_ARRAY)];
        for column in &changes.columns {
            parameters.push((&column.old, Type::TEXT_ARRAY));
            parameters.push((&column.new, Type::TEXT_ARRAY));
        }
        let written = client.execute_typed(&self.write, &parameters).await;
        written.map_err(|error| self.no_right(error, "write rows"))
    }
}

/// The rows of a batch that change, by `ctid`, and their old and new masks.
pub(super) struct Changes<'a> {
    pub(super) row_ids: Vec<&'a str>,
    pub(super) columns: Vec<Column<'a>>,
}

/// One column's masks.
#[derive(Default)]
pub(super) struct Column<'a> {
    pub(super) old: Vec<Option<&'a str>>,
    pub(super) new: Vec<Option<String>>,
}
