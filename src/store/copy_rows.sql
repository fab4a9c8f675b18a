-- Takes rows in the binary format: https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.55.9.4
copy user_logins (user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date)
from stdin (format binary)
